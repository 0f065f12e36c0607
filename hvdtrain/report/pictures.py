"""Pictures of runs: which there are, and what is in each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from hvdtrain.report.drawing import COLORS, Picture, drawn, plain_text
from hvdtrain.report.reading import Run
from hvdtrain.report.telling import PHASES, phases_of, throughput

_PHASE_COLORS = {
    "data": "#e69f00", "forward": "#56b4e9", "backward": "#0072b2", "exchange": "#d55e00", "optimizer": "#009e73",
    "other": "#999999",
}  # fmt: skip
_MOST_RANKS = 32


@dataclass(frozen=True, slots=True)
class Curve:
    """Points to be joined; a NaN leaves a gap, a point alone is marked."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    color: str
    style: str = "-"
    extra: dict[str, Any] = field(default_factory=dict)


def pictures(runs: Sequence[Run], metrics: Sequence[str]) -> list[Picture]:
    """All pictures for which some run has numbers, in the order of the page.

    Args:
        runs: Laid over each other.
        metrics: Of evaluations, as records name them.
    """
    made = [
        _curves("loss", "Loss", "training loss at logged steps, and the evaluation's", "loss", _losses(runs)),
        *(_curves(*of) for of in _metrics(runs, metrics)),
        _amounts("throughput", "Throughput", "of all ranks between logged steps", "samples/s", _each(runs, throughput)),
        _phase_bars(runs),
        _phases_over_time(runs),
        _stragglers(runs),
        _curves("learning_rate", "Learning rate", "of the first parameter group", "learning rate", _named(runs, "lr")),
        _curves("gradient_norm", "Gradient norm", "before clipping", "L2 norm", _named(runs, "gradient_norm")),
        _amounts("memory", "Memory", "rank 0's GPU, or resident set", "MB", _named(runs, "memory_bytes", 1e-6)),
        _amounts("bytes", "Bytes sent", "rank 0, in a step", "MB", _named(runs, "sent_bytes_per_step", 1e-6)),
    ]
    return [each for each in made if each is not None]


def _losses(runs: Sequence[Run]) -> list[Curve]:
    found = []
    for at, run in enumerate(runs):
        color = COLORS[at % len(COLORS)]
        prefix = "" if len(runs) == 1 else f"{run.name} "
        found.append(Curve(f"{prefix}training", *_points(run.steps, "loss"), color))
        evaluated = Curve(f"{prefix}evaluation", *_points(run.evaluations, "eval_loss"), color, "--", {"marker": "o"})
        found.append(evaluated)
    return found


def _metrics(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, str, str, str, list[Curve]]]:
    found: list[tuple[str, str, str, str, list[Curve]]] = []
    for name in names:
        title = name.removeprefix("eval_")
        curves = [
            Curve(run.name, *_points(run.evaluations, name), COLORS[at % len(COLORS)], extra={"marker": "o"})
            for at, run in enumerate(runs)
        ]
        safe = "".join(sign if sign.isascii() and sign.isalnum() else "_" for sign in name)[:60]
        if any(safe.lower() == other.lower() for other, *_ in found):  # of names in other scripts little is left
            safe = f"{safe}_{len(found) + 1}"
        found.append((safe, title[:1].upper() + title[1:], "over the whole evaluation data", title, curves))
    return found


def _named(runs: Sequence[Run], name: str, factor: float = 1.0) -> list[Curve]:
    def points(run: Run) -> tuple[list[float], list[float]]:
        steps, values = _points([record for record in run.steps if name in record], name)
        return steps, [factor * value for value in values] if any(values) else [math.nan for _ in values]

    return _each(runs, points)


def _each(runs: Sequence[Run], points: Callable[[Run], tuple[list[float], list[float]]]) -> list[Curve]:
    return [Curve(run.name, *points(run), COLORS[at % len(COLORS)]) for at, run in enumerate(runs)]


def _points(records: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    return [record["step"] for record in records], [_drawable(record.get(name, math.nan)) for record in records]


def _drawable(value: float) -> float:
    """A gap for what is beyond any axis."""
    return value if abs(value) < 1e100 and (not value or abs(value) > 1e-100) else math.nan


def _curves(
    name: str, title: str, note: str, unit: str, curves: Sequence[Curve], *, from_zero: bool = False
) -> Picture | None:
    shown = [curve for curve in curves if any(math.isfinite(value) for value in curve.values)]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for curve in shown:
            alone = sum(math.isfinite(value) for value in curve.values) == 1
            extra = {"marker": "o", **curve.extra} if alone else curve.extra
            axes.plot(
                curve.steps, curve.values, curve.style, color=curve.color, label=plain_text(curve.label), linewidth=1.4,
                markersize=3.5, **extra,
            )  # fmt: skip
        if from_zero:
            axes.set_ylim(bottom=0)
        else:
            _scale(axes, [value for curve in shown for value in curve.values if math.isfinite(value)])
        axes.set_xlabel("step")
        axes.set_ylabel(plain_text(unit))
        if len(shown) > 1:
            axes.legend(fontsize=8)

    return drawn(name, title, note, draw)


def _amounts(name: str, title: str, note: str, unit: str, curves: Sequence[Curve]) -> Picture | None:
    """Curves whose distance from zero matters."""
    return _curves(name, title, note, unit, curves, from_zero=True)


def _scale(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where values are of very different sizes."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 200:
        axes.set_yscale("log")
    elif low == high:
        room = abs(low) * 0.1 or 1.0
        axes.set_ylim(low - room, high + room)


def _phase_bars(runs: Sequence[Run]) -> Picture | None:
    rows: list[tuple[str, dict[str, float]]] = []
    for run in runs:
        phases = phases_of(run)
        if phases is None:
            continue
        ranks = sorted(range(phases.ranks), key=lambda rank, of=phases: -of.own(rank))[:_MOST_RANKS]  # type: ignore[misc]
        for rank in sorted(ranks):
            label = f"rank {rank}" if len(runs) == 1 else f"{run.name}, rank {rank}"
            rows.append((label, {phase: of[rank] for phase, of in phases.seconds.items()}))
    if not rows:
        return None
    rows = rows[: 4 * _MOST_RANKS]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = range(len(rows))
        left = [0.0] * len(rows)
        for phase in dict.fromkeys(phase for _, seconds in rows for phase in seconds):
            width = [1e3 * seconds.get(phase, 0.0) for _, seconds in rows]
            axes.barh(places, width, left=left, color=_PHASE_COLORS.get(phase, "#444444"), label=plain_text(phase))
            left = [a + b for a, b in zip(left, width, strict=True)]
        axes.set_yticks(list(places), [plain_text(label) for label, _ in rows])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("milliseconds of a step")
        _legend_above(axes)

    note = "mean over the run, by rank; exchange is what is not hidden behind the backward pass, waiting for slower ranks included"
    height = max(2.2, 1.3 + 0.3 * len(rows))
    return drawn("phases", "Where the time of a step goes", note, draw, height=height)


def _phases_over_time(runs: Sequence[Run]) -> Picture | None:
    if len(runs) != 1:
        return None
    records = [record for record in runs[0].steps if "phases" in record]
    if len(records) < 2:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        steps = [record["step"] for record in records]
        rows = [[1e3 * statistics.fmean(record["phases"].get(p, [0.0])) for record in records] for p in PHASES]
        axes.stackplot(steps, rows, labels=PHASES, colors=[_PHASE_COLORS[phase] for phase in PHASES], linewidth=0)
        totals = sorted(map(sum, zip(*rows, strict=True)))
        top = totals[int(0.98 * (len(totals) - 1))]  # a first step of seconds would flatten the rest
        if top > 0:
            axes.set_ylim(0, 1.25 * top)
        axes.set_xlabel("step")
        axes.set_ylabel("milliseconds of a step")
        _legend_above(axes)

    return drawn("phases_over_time", "The same over the run", "mean over the ranks at logged steps", draw)


def _stragglers(runs: Sequence[Run]) -> Picture | None:
    if len(runs) != 1:
        return None
    records = [r for r in runs[0].steps if "phases" in r and len(next(iter(r["phases"].values()))) > 1]
    if not records:
        return None

    def own(record: dict[str, Any]) -> list[float]:
        rows = [of for phase, of in record["phases"].items() if phase != "exchange"]
        return [1e3 * sum(of) for of in zip(*rows, strict=True)] or [0.0]

    steps = [record["step"] for record in records]
    each = [own(record) for record in records]
    curves = [
        Curve("slowest rank", steps, [max(of) for of in each], COLORS[1]),
        Curve("median rank", steps, [statistics.median(of) for of in each], COLORS[0]),
        Curve("fastest rank", steps, [min(of) for of in each], COLORS[2]),
    ]
    note = "milliseconds of a step that ranks spend on their own work, all but the exchange"
    return _curves("stragglers", "Slow and fast ranks", note, "ms", curves)


def _legend_above(axes: Any) -> None:
    axes.legend(ncols=6, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, columnspacing=1.2)
