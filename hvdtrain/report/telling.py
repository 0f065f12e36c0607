"""What the records of a run come to, in numbers and sentences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

from hvdtrain.observe.quantities import in_bytes, in_duration
from hvdtrain.report.reading import Run

PHASES = ("data", "forward", "backward", "exchange", "optimizer", "other")
_SLOW = 1.1  # times the median of the ranks
_MEANINGFUL_S = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """Mean seconds of a step over a run, by phase and rank, after its first logged step where there are more."""

    seconds: dict[str, list[float]]

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return len(next(iter(self.seconds.values())))

    def own(self, rank: int) -> float:
        """What a rank does in a step besides waiting for the exchange."""
        return sum(of[rank] for phase, of in self.seconds.items() if phase != "exchange")

    def mean(self, phase: str) -> float:
        """Over the ranks."""
        return statistics.fmean(self.seconds.get(phase, [0.0]))

    @property
    def step(self) -> float:
        """Seconds of a step, a mean over the ranks."""
        return sum(self.mean(phase) for phase in self.seconds)


def phases_of(run: Run, *, typical: bool = False) -> Phases | None:
    """A run's phases; None if it has none. After a restart with other ranks, those of the last start.

    Args:
        run: Which.
        typical: Medians over the logged steps, and not means: what happened once does not count.
    """
    middle = statistics.median if typical else statistics.fmean
    measured = [record for record in run.steps if "phases" in record]
    if not measured:
        return None
    ranks = _ranks(measured[-1])
    last = list(takewhile(lambda record: _ranks(record) == ranks, reversed(measured)))[::-1]
    # The first of a start has what happens once: files that are read, kernels that are chosen.
    later = [record for before, record in pairwise(last) if before["start"] == record["start"]]
    same = [record["phases"] for record in later or last]
    names = [*PHASES, *sorted({phase for each in same for phase in each} - {*PHASES})]
    seconds = {
        phase: [middle([each.get(phase, [0.0] * ranks)[rank] for each in same]) for rank in range(ranks)]
        for phase in names
    }
    return Phases(seconds={phase: of for phase, of in seconds.items() if any(of)} or {"other": [0.0] * ranks})


def _ranks(record: dict[str, Any]) -> int:
    return len(next(iter(record["phases"].values())))


def throughput(run: Run) -> tuple[list[float], list[float]]:
    """Samples per second between logged steps: the steps, and the rates."""
    steps, rates = [], []
    before, start = (0.0, 0.0), 0
    for record in run.steps:
        seconds, mean = record.get("train_seconds", math.nan), record.get("samples_per_second", math.nan)
        samples = seconds * mean
        if not math.isfinite(samples):
            rate = mean  # an earlier version: the mean since the start
        elif record["start"] != start or seconds <= before[0] or samples < before[1]:  # the run was started again
            rate, before, start = mean, (seconds, samples), record["start"]
        else:
            rate, before = (samples - before[1]) / (seconds - before[0]), (seconds, samples)
        if 0 <= rate < 1e100:
            steps.append(record["step"])
            rates.append(rate)
    return steps, rates


def stragglers(phases: Phases) -> list[str]:
    """Sentences on ranks that make the others wait."""
    if phases.ranks < 2:
        return ["One rank: nobody waits for another."]
    own = [phases.own(rank) for rank in range(phases.ranks)]
    median = statistics.median_low(own)
    said = []
    for rank in sorted(range(phases.ranks), key=lambda each: -own[each])[:8]:
        if own[rank] < _SLOW * median or own[rank] - median < _MEANINGFUL_S:
            break
        more = {
            phase: of[rank] - statistics.median_low(of) for phase, of in phases.seconds.items() if phase != "exchange"
        }
        where = max(more, key=lambda phase: more[phase])
        said.append(
            f"Rank {rank} takes {own[rank] * 1e3:.3g} ms of its own in a step, {own[rank] / median if median else math.inf:.2g} times the "
            f"median rank's; most of the difference is in {where} ({more[where] * 1e3:+.3g} ms)."
        )
    if not said:
        return [f"No rank takes more than {_SLOW - 1:.0%} longer than the median rank."]
    waits = [of for rank, of in enumerate(phases.seconds.get("exchange", [0.0] * phases.ranks))]
    return [*said, f"The rank that waits longest for an exchange waits {max(waits) * 1e3:.3g} ms in a step."]


def numbers(run: Run) -> dict[str, str]:
    """The table of a run."""
    last = run.steps[-1] if run.steps else {}
    environment = run.environments[-1] if run.environments else {}
    said: dict[str, str] = {}

    def add(name: str, value: Any, form: str = "{}") -> None:
        if value is not None and not (isinstance(value, float) and not math.isfinite(value)):
            said[name] = form.format(value)

    def known(name: str) -> Any:
        return run.summary.get(name, environment.get(name))

    engine = known("engine")
    add("backend", known("backend"), "{}" if engine is None else f"{{}} ({engine})")
    add("ranks", known("world_size"))
    add("steps", _count(run.summary.get("steps"), last.get("step")))
    add("epochs", _count(run.summary.get("epochs"), last.get("epoch")))
    add("last loss", last.get("loss"), "{:.4g}")
    for name, value in (run.evaluations[-1] if run.evaluations else {}).items():
        if name.startswith("eval_"):
            add(f"last {name.replace('_', ' ', 1)}", value, "{:.4g}")
    rates = throughput(run)[1]
    if rates:
        add("samples per second (median)", statistics.median(rates), "{:,.0f}")
    phases = phases_of(run)
    if phases is not None:
        add("step", phases.step * 1e3, "{:.3g} ms")
        for phase in phases.seconds:
            share = phases.mean(phase) / phases.step if phases.step else 0.0
            said[f"of which {phase}"] = f"{phases.mean(phase) * 1e3:.3g} ms ({share:.0%})"
    if last.get("sent_bytes_per_step"):
        said["sent by rank 0 in a step"] = in_bytes(last["sent_bytes_per_step"])
    memory = [record["memory_bytes"] for record in run.steps if "memory_bytes" in record]
    if memory:
        said["largest memory of rank 0"] = in_bytes(max(memory))
    seconds = run.summary.get("wall_seconds")
    if isinstance(seconds, int | float):
        said["whole run"] = in_duration(seconds)
    return said


def environment(run: Run) -> dict[str, str]:
    """Where a run ran, as its last start says; of an earlier version what its summary says."""
    found = run.environments[-1] if run.environments else {}
    said = {name: _flat(value) for name, value in found.items() if name not in ("kind", "step")}
    names = {"hvdtrain_version": "hvdtrain", "torch_version": "torch", "launcher": "launcher", "device": "device"}
    for name, shown in names.items():
        if shown not in said and name in run.summary:
            said[shown] = _flat(run.summary[name])
    return said


def differing(tables: Sequence[dict[str, str]]) -> list[str]:
    """Names whose values are not the same in all tables, in the order in which they come."""
    every = dict.fromkeys(name for table in tables for name in table)
    return [name for name in every if len({table.get(name) for table in tables}) > 1]


def _count(*values: Any) -> int | None:
    """The first that is a number."""
    return next((int(value) for value in values if isinstance(value, int | float) and math.isfinite(value)), None)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(_flat(each) for each in value[:64])
    return str(value)
