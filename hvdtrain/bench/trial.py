"""What one short run of a task under an engine took, read from the records that it left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.errors import ConfigError
from hvdtrain.report.reading import read_run
from hvdtrain.report.telling import phases_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One run.

    Attributes:
        samples_per_second: Over all ranks, after the first logged step.
        step_s: Seconds of a step, the mean over ranks.
        exchange_s: Of these, waiting for the exchange: what is not hidden, slower ranks included.
        memory_bytes: The most that rank 0 had.
        began: Wall-clock seconds of the first logged step, and of the last; NaN where it is not told.
        ended: See ``began``.
        samples: Between them.
        joules: Of the machine between them; None where they cannot be read.
        launcher: What started the ranks, and what they computed on: "cpu", "cuda:0".
        device: See ``launcher``.
    """

    samples_per_second: float
    step_s: float
    exchange_s: float
    memory_bytes: float
    began: float = math.nan
    ended: float = math.nan
    samples: float = math.nan
    joules: float | None = None
    launcher: str = ""
    device: str = ""


def read_trial(folder: Path) -> Trial:
    """Read a run's folder.

    Raises:
        ConfigError: Its records do not say how fast it was.
    """
    run = read_run(folder, folder.name)
    timed = [
        (record["train_seconds"], record["train_seconds"] * record["samples_per_second"])
        for record in run.steps
        if math.isfinite(record.get("train_seconds", math.nan) * record.get("samples_per_second", math.nan))
    ]
    phases = phases_of(run)
    if len(timed) < 2 or phases is None or timed[-1][0] <= timed[0][0]:
        raise ConfigError(f"{folder} has too few logged steps to say how fast it was; give more --steps")
    (first_s, first), (last_s, last) = timed[0], timed[-1]
    clock = [record["time"] for record in run.steps if math.isfinite(record.get("time", math.nan))]
    place = run.environments[-1] if run.environments else {}
    return Trial(
        began=clock[0] if clock else math.nan,
        ended=clock[-1] if clock else math.nan,
        samples=last - first,
        launcher=str(place.get("launcher", "")),
        device=str(place.get("device", "")),
        samples_per_second=(last - first) / (last_s - first_s),
        step_s=phases.step,
        exchange_s=phases.mean("exchange"),
        memory_bytes=max((record.get("memory_bytes", math.nan) for record in run.steps), default=math.nan),
    )
