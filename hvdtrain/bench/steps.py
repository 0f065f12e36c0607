"""What rounds of timed steps come to. Pure, but for reading."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdtrain.bench.gathered import read_ranks, slowest
from hvdtrain.bench.spread import Spread
from hvdtrain.observe.quantities import in_bytes

ALONE, DDP, DDP_MPI4PY, HOROVOD = "alone", "ddp", "ddp-mpi4py", "horovod-plain"
"""Beside the engines: every rank by itself; torch's DistributedDataParallel, also over MPI; hvd.DistributedOptimizer."""
_LOSSES_DIFFER = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch of a contender.

    Attributes:
        seconds: Of each iteration, on the slowest rank.
        began: Wall-clock seconds of the first, and of the end of the last.
        ended: See ``began``.
        third_loss: Of rank 0: after two exchanges, all that train alike have the same.
        memory_bytes: The most that a rank had.
        joules: Of the machine meanwhile; None where they cannot be read.
    """

    seconds: list[float]
    began: float
    ended: float
    third_loss: float
    memory_bytes: float
    joules: float | None = None


@dataclass(kw_only=True, slots=True)
class Steps:
    """All launches.

    Attributes:
        samples: Of an iteration, over all ranks.
        batches: Steps of an iteration.
        launches: By contender.
    """

    samples: int
    batches: int
    launches: dict[str, list[Launch]] = field(default_factory=dict)

    def rates(self, contender: str) -> list[float]:
        """Samples a second over all ranks, of each iteration."""
        return [self.samples / seconds for launch in self.launches[contender] for seconds in launch.seconds]

    def step_s(self, contender: str) -> Spread:
        """Seconds of a step."""
        return Spread.of([seconds / self.batches for launch in self.launches[contender] for seconds in launch.seconds])

    def joules_per_sample(self, contender: str) -> float | None:
        """Of the whole machine; None where they could not be read."""
        known = [
            launch.joules / (self.samples * len(launch.seconds))
            for launch in self.launches[contender]
            if launch.joules is not None
        ]
        return statistics.median(known) if known else None


def read_launch(folder: Path, ranks: int) -> Launch:
    """What the ranks of one launch wrote.

    Raises:
        ConfigError: Not every rank wrote what it should.
    """
    of_ranks = read_ranks(folder, ranks)
    return Launch(
        seconds=slowest(one["seconds"] for one in of_ranks),
        began=min(one["began"] for one in of_ranks),
        ended=max(one["ended"] for one in of_ranks),
        third_loss=of_ranks[0]["third_loss"],
        memory_bytes=max(one["memory_bytes"] for one in of_ranks),
    )


def rows(steps: Steps) -> list[list[str]]:
    """A table: the header, then a line a contender. ``±`` is 1.96 standard deviations over iterations, as in Horovod's script."""
    found = [["", "samples/s", "±", "step ms", "quartiles", "to alone", "memory", "J/sample"]]
    for contender, launches in steps.launches.items():
        rates, step = steps.rates(contender), steps.step_s(contender).scaled(1e3)
        around = 1.96 * statistics.pstdev(rates)
        beside = f"{step.median / (1e3 * steps.step_s(ALONE).median):.2f}" if ALONE in steps.launches else ""
        joules = steps.joules_per_sample(contender)
        found.append(
            [
                contender, f"{statistics.fmean(rates):,.1f}", f"{around:,.1f}", f"{step.median:.4g}",
                f"{step.low:.4g}-{step.high:.4g}", beside, in_bytes(max(each.memory_bytes for each in launches)),
                "" if joules is None else f"{joules:.3g}",
            ]
        )  # fmt: skip
    keep = [at for at in range(len(found[0])) if at < 5 or any(row[at] for row in found[1:])]
    return [[row[at] for at in keep] for row in found]


def unlike(steps: Steps) -> str:
    """A sentence on contenders that do not train alike; "" if all do, `ALONE` left out."""
    losses = [
        (name, launch.third_loss) for name, launches in steps.launches.items() for launch in launches if name != ALONE
    ]
    if not losses:
        return ""
    middle = statistics.median(loss for _, loss in losses)
    wrong = [f"{name} {loss:.6g}" for name, loss in losses if not math.isclose(loss, middle, rel_tol=_LOSSES_DIFFER)]
    if not wrong:
        return ""
    return f"these do not train alike: the third loss is {middle:.6g}, but {', '.join(dict.fromkeys(wrong))}."


def as_json(steps: Steps, **environment: Any) -> dict[str, Any]:
    """All of it, for programs."""
    results: Mapping[str, Any] = {
        contender: {
            "samples_per_second": Spread.of(steps.rates(contender)).as_json(),
            "step_seconds": steps.step_s(contender).as_json(),
            "iterations": sum(len(launch.seconds) for launch in launches),
            "memory_bytes": max(launch.memory_bytes for launch in launches),
            "third_loss": launches[-1].third_loss,
            "joules_per_sample": steps.joules_per_sample(contender),
        }
        for contender, launches in steps.launches.items()
    }
    return {"benchmark": "step", **environment, "results": results}
