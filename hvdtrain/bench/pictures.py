"""Pictures of benchmarks, in the style of a report's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from hvdtrain.bench.bandwidth import size_named
from hvdtrain.bench.collectives import Measured, bandwidths
from hvdtrain.bench.spread import Spread
from hvdtrain.observe.whole_file import write_output
from hvdtrain.report.drawing import COLORS, drawn, plain_text

_PANEL_INCHES = 3.0


def draw_bandwidths(measured: Measured, collectives: Sequence[str], file: Path) -> None:
    """Bus bandwidth by size, a panel a collective, with the quartiles behind each line."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(collectives), 1, squeeze=False, sharex=True)[:, 0]
        for axes, collective in zip(panels, collectives, strict=True):
            for at, (contender, points) in enumerate(bandwidths(measured, collective).items()):
                sizes = [size for size, _ in points]
                rates = [spread.scaled(1e-9) for _, spread in points]
                color = COLORS[at % len(COLORS)]
                axes.plot(
                    sizes, [rate.median for rate in rates], "o-", color=color, label=plain_text(contender), markersize=3
                )
                axes.fill_between(
                    sizes, [r.low for r in rates], [r.high for r in rates], color=color, alpha=0.15, linewidth=0
                )
            axes.set(xscale="log", yscale="log", ylabel="GB/s", title=f"{collective}, {measured.ranks} ranks")
        every = sorted({size for of in measured.times.values() for by_size in of.values() for size in by_size})[::2]
        panels[-1].set_xticks(every, [size_named(size) for size in every], rotation=45)
        panels[-1].minorticks_off()
        panels[0].legend(fontsize=8, ncols=5)

    _write("bandwidth", draw, file, _PANEL_INCHES * len(collectives))


def draw_rates(rates: Mapping[str, Spread], file: Path) -> None:
    """Samples per second as bars, with the quartiles; the fastest first."""
    ordered = sorted(rates.items(), key=lambda each: -each[1].median)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = range(len(ordered))
        values = [rate.median for _, rate in ordered]
        around = [[rate.median - rate.low for _, rate in ordered], [rate.high - rate.median for _, rate in ordered]]
        axes.barh(places, values, xerr=around, color=COLORS[0], ecolor="#444444", capsize=2)
        axes.set_yticks(list(places), [plain_text(name) for name, _ in ordered])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("samples/s")

    _write("rates", draw, file, 1.0 + 0.3 * len(ordered))


def draw_scaling(
    projected: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    measured: Mapping[str, Sequence[tuple[int, float]]],
    file: Path,
) -> None:
    """Scaling efficiency by ranks, a panel an engine.

    Args:
        projected: Points of ranks and efficiency from 0 to 1, by engine and form of exchange.
        measured: The same, by engine.
        file: Is written.
    """

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(projected), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (engine, forms) in zip(panels, projected.items(), strict=True):
            for at, (form, points) in enumerate(forms.items()):
                ranks, values = zip(*points, strict=True)
                axes.plot(
                    ranks, [100 * value for value in values], color=COLORS[at % len(COLORS)], label=plain_text(form)
                )
            ranks, values = zip(*measured[engine], strict=True)
            axes.plot(ranks, [100 * value for value in values], "ko", label="measured", markersize=4)
            axes.set(xscale="log", ylabel="scaling efficiency, %", title=plain_text(engine))
            axes.set_ylim(bottom=0)
        every = sorted(
            {number for forms in projected.values() for points in forms.values() for number, _ in points}
            | {number for points in measured.values() for number, _ in points}
        )
        panels[-1].set_xlabel("ranks")
        panels[-1].set_xticks(every, [str(number) for number in every])
        panels[-1].minorticks_off()
        panels[0].legend(fontsize=8)

    _write("scaling", draw, file, _PANEL_INCHES * len(projected) + 0.4)


def _write(name: str, draw: Callable[[Figure], None], file: Path, height: float) -> None:
    picture = drawn(name, name, "", draw, height=height)
    write_output(file, picture.svg if file.suffix == ".svg" else picture.png, remedy="choose another --plot")
