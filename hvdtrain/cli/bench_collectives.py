"""``hvdtrain bench collectives``: latency and bus bandwidth of every engine's collectives, by size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from hvdtrain.bench.bandwidth import FACTORS, size_of, sizes, whole_size
from hvdtrain.bench.collectives import COPY, RAW, Measured, as_json, collectives_of, read_times, rows
from hvdtrain.cli.bench_flags import BenchFlags
from hvdtrain.cli.places import read, say_help
from hvdtrain.cli.trials import (
    Contender,
    conclude,
    contender_ran,
    environment,
    in_turns,
    out_file,
    picture_file,
    starters,
    survivors,
    table,
    workplace,
)
from hvdtrain.cli.voice import say
from hvdtrain.errors import ConfigError, HvdtrainError
from hvdtrain.settings.options import option

_USAGE = "hvdtrain bench collectives [FLAG VALUE ...]"
_INTRO = """\
Time every engine's collectives at sizes from 4 bytes on, in powers of two, with
raw MPI (mpi4py) and a copy of memory beside them. Each is started anew in every
round, in another order. A time is that of the slowest rank; figures are medians
and quartiles of all calls; GB/s is bus bandwidth as nccl-tests define it (of a
copy: bytes copied), KiB and MiB are powers of 1024.
  hvdtrain bench collectives --ranks 4 --max-bytes 64M --plot bandwidth.png"""
_EPILOG = """\
exit codes:
  0    done
  1    some engine failed
  2    wrong flag"""
MODULE = "hvdtrain.bench.collective_rank"


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectivesWishes(BenchFlags):
    """The flags of ``hvdtrain bench collectives``."""

    ranks: int = option(2, "ranks of each engine", group="what", metavar="N", at_least=2, at_most=1024)
    collectives: str = option(",".join(FACTORS), "which ones", group="what", metavar="A,B")
    max_bytes: str = option("16M", "largest size: bytes, or 64K, 16M, 1G", group="what", metavar="BYTES")
    beside: bool = option(True, "measure raw MPI and a copy of memory too", group="what")
    device: str = option("cpu", "where tensors lie", group="what", choices=("cpu", "cuda"))
    seconds: float = option(
        0.05, "for each collective and size, of each start", group="how", metavar="S", above=0, at_most=60
    )
    plot: str | None = option(
        None, "draw bus bandwidth by size, .png or .svg", group="where", metavar="FILE", default_text="nothing"
    )

    def __post_init__(self) -> None:
        BenchFlags.__post_init__(self)  # super() without arguments knows no class whose slots were made afterwards
        largest = size_of("--max-bytes", self.max_bytes)
        for name in collectives_of(self.collectives):
            if not any(whole_size(name, size, self.ranks) for size in sizes(largest)):
                raise ConfigError(
                    f"--max-bytes {self.max_bytes}: {name} cannot be cut for {self.ranks} ranks; give {8 * self.ranks} or more"
                )


def run(argv: Sequence[str]) -> int:
    """Reads the flags, measures in turns and says what was found.

    Returns:
        0, or 1 if something failed.

    Raises:
        HvdtrainError: A flag is wrong, or nothing could be measured.
    """
    command = read(CollectivesWishes, argv, ())
    if command.config is None:
        return say_help(CollectivesWishes, command, usage=_USAGE, intro=_INTRO, epilog=_EPILOG)
    wishes: CollectivesWishes = command.config
    out, plot = out_file(wishes.out or "", "collectives.json"), picture_file(wishes.plot)
    collectives, all_sizes = collectives_of(wishes.collectives), sizes(size_of("--max-bytes", wishes.max_bytes))
    contenders = _contenders(wishes)
    measured = Measured(ranks=wishes.ranks)
    with workplace("bench") as place:
        wish = place / "wish.json"
        asked = {
            "sizes": all_sizes, "collectives": collectives, "seconds": wishes.seconds, "device": wishes.device,
        }  # fmt: skip
        wish.write_text(json.dumps(asked))
        limit_s = wishes.limit_s(10 * len(all_sizes) * len(collectives) * (1 + wishes.seconds))

        def once(contender: Contender, turn: int) -> str:
            folder = place / f"{contender.name}-{turn}".replace(" ", "")
            ranks = 1 if contender.name == COPY else wishes.ranks
            how = contender_ran(contender, ranks, MODULE, wish, folder, limit_s=limit_s)
            if how:
                return how
            try:
                measured.add(contender.name, read_times(folder, ranks))
            except ConfigError as error:
                return str(error)
            if not wishes.json:
                say(f"round {turn + 1}/{wishes.rounds}: {contender.name}")
            return ""

        failed = in_turns(contenders, wishes.rounds, once, quiet=wishes.json)
    measured.times = survivors(measured.times, contenders, failed)
    if not measured.times:
        raise HvdtrainError("nothing could be measured; hvdtrain doctor says what is wrong here")
    said = [f"\n{name}, {wishes.ranks} ranks\n{table(rows(measured, name, all_sizes))}" for name in collectives]
    found = as_json(measured, **environment(), device=wishes.device, rounds=wishes.rounds, failed=failed)
    conclude(found, "\n".join(said), out, as_json=wishes.json)
    if plot is not None:
        from hvdtrain.bench.pictures import draw_bandwidths  # noqa: PLC0415  (matplotlib: half a second)

        draw_bandwidths(measured, collectives, plot)
    return int(bool(failed))


def _contenders(wishes: CollectivesWishes) -> list[Contender]:
    alone, engines = starters(wishes.engines or "")
    found = [Contender(name=each.backend, starter=each) for each in engines]
    if not wishes.beside or wishes.device == "cuda":
        return found
    _, everything = starters("")
    for starter in everything:
        if starter.name == "mpirun" and find_spec("mpi4py") is not None:
            found.append(Contender(name=RAW, starter=starter))
    return [*found, Contender(name=COPY, starter=alone)]
