"""``hvdtrain bench``: what there is to measure; each is a module of its own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

from hvdtrain.cli.voice import say
from hvdtrain.settings.flags import UsageError
from hvdtrain.settings.wording import did_you_mean

BENCHMARKS: Mapping[str, str] = {
    "engines": "hvdtrain.cli.bench_engines",
    "step": "hvdtrain.cli.bench_step",
    "collectives": "hvdtrain.cli.bench_collectives",
    "scaling": "hvdtrain.cli.bench_scaling",
}
_HELP = """\
usage: hvdtrain bench {engines,step,collectives,scaling} [FLAG VALUE ...]

  engines       a task of yours under each engine: which one to take
  step          Horovod's synthetic benchmark under each engine, DDP and Horovod
  collectives   latency and bus bandwidth by size
  scaling       1, 2, 4, ... ranks, and what more of them would come to

hvdtrain bench NAME --help shows the flags of each."""


def run(argv: Sequence[str]) -> int:
    """Runs the benchmark that the first word names.

    Returns:
        Its exit code.

    Raises:
        HvdtrainError: There is no such benchmark, or it failed.
    """
    if not argv or argv[0] in ("--help", "-h"):
        say(_HELP)
        return 0 if argv else 2
    if argv[0] not in BENCHMARKS:
        guess = did_you_mean(argv[0], BENCHMARKS)
        raise UsageError(f"hvdtrain bench has no {argv[0]!r}{guess or ';'} There are {', '.join(BENCHMARKS)}")
    code: int = importlib.import_module(BENCHMARKS[argv[0]]).run(argv[1:])
    return code
