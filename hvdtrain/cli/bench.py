"""``hvdtrain bench engines``: which engine trains a task fastest on this machine?"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hvdtrain.cli.trials import CONFIG, count, own_flags, starters, trained
from hvdtrain.cli.voice import say
from hvdtrain.errors import ConfigError, HvdtrainError
from hvdtrain.launch.starting import Starter
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.flags import UsageError, build, read_flags

_HELP = """\
usage: hvdtrain bench engines [--ranks N] [--rounds N] [--steps N] [--engines A,B] [--out FILE] [FLAG VALUE ...]

Train a few steps of a task on several ranks of each engine that is here, in
turns and anew in each round, so that a slow minute meets all of them. Say how
fast each was, what of the exchange was waited for, and which to take. Flags of
training say what is trained, as in
  hvdtrain bench engines --task my_module:MyTask --batch-size 32

  --ranks N       ranks of each engine (2)
  --rounds N      how often each engine is started (3)
  --steps N       optimizer steps of each start, an eighth of them to warm up (80)
  --engines A,B   of torch, mpi, horovod (all that are here)
  --out FILE      write everything as JSON

exit codes: 0 done, 1 an engine failed, 2 wrong flag"""
_OWN = {"--ranks": "2", "--rounds": "3", "--steps": "80", "--engines": "", "--out": ""}
_LIMIT_S = 1800.0


def run(argv: Sequence[str]) -> int:
    """Reads the flags, runs the task in turns and says what was found.

    Returns:
        0, or 1 if some engine failed.

    Raises:
        HvdtrainError: A flag is wrong, or no engine could train the task.
    """
    if {"--help", "-h"} & set(argv) or not argv:
        say(_HELP)
        return 0 if argv else 2
    if argv[0] != "engines":
        raise UsageError(f"hvdtrain bench {argv[0]}: there is engines; --help shows how")
    own, rest = own_flags(argv[1:], _OWN)
    ranks, rounds, steps = (count(name, own[name]) for name in ("--ranks", "--rounds", "--steps"))
    if steps < 16:
        raise UsageError(f"--steps {steps}: give at least 16; the first ones are slower than the others")
    config: TrainConfig = build(TrainConfig, read_flags(TrainConfig, rest))
    _, tried = starters(own["--engines"])
    from hvdtrain.bench.comparing import as_json, choose, table  # noqa: PLC0415  (the standard library would do, but torch)
    from hvdtrain.bench.trial import Trial, read_trial  # noqa: PLC0415

    trials: dict[str, list[Trial]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="hvdtrain-bench-") as place:
        for turn in range(rounds):
            for starter in tried[turn % len(tried) :] + tried[: turn % len(tried)]:
                if starter.backend in failed:
                    continue
                folder = Path(place) / f"{starter.backend}-{turn}"
                how = _trained(starter, ranks, steps, config, folder)
                try:
                    trial = None if how else read_trial(folder / "run")
                except ConfigError as error:  # the task ended training early
                    trial, how = None, str(error)
                if trial is None:
                    failed[starter.backend] = how
                    say(f"{starter.backend} ({starter.name}) failed: {how}")
                    trials.pop(starter.backend, None)
                    continue
                trials.setdefault(starter.backend, []).append(trial)
                say(f"round {turn + 1}/{rounds}: {starter.backend:<8} {trial.samples_per_second:,.0f} samples/s")
    if not trials:
        raise HvdtrainError("no engine could train the task; hvdtrain doctor says what is wrong here")
    choice = choose(trials)
    say(f"\n{table(trials)}\n\n{choice.sentence}")
    if own["--out"]:
        from hvdtrain.observe.whole_file import write_whole  # noqa: PLC0415

        known = {
            "world_size": ranks,
            "steps": steps,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "failed": failed,
        }
        text = json.dumps(as_json(trials, choice, **known), indent=1)
        write_whole(Path(own["--out"]), text + "\n", remedy="choose another --out")
    return int(bool(failed))


def _trained(starter: Starter, ranks: int, steps: int, config: TrainConfig, folder: Path) -> str:
    """Train under a launcher; returns how it failed, or ""."""
    whole = replace(
        config, resume="never", epochs=10**6, max_steps=steps, log_every=max(1, steps // 8), checkpoint_every=0,
        checkpoint_minutes=None, logger="none", eval_every=10**6, profile=None,
    )  # fmt: skip
    return trained(
        starter, ranks, whole, folder, ["-m", "hvdtrain", "--config", str(folder / CONFIG)], limit_s=_LIMIT_S
    )
