"""How pictures are drawn by matplotlib: SVG for the page, PNG for elsewhere. Nothing here touches matplotlib's global state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
INCHES = (7.6, 3.4)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "legend.frameon": False, "axes.formatter.useoffset": False,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One picture.

    Attributes:
        name: Of its file.
        title: Its heading.
        note: What one sees, in a sentence.
        svg: An ``<svg>`` element.
        png: A file's content.
    """

    name: str
    title: str
    note: str
    svg: str
    png: bytes


def drawn(name: str, title: str, note: str, draw: Callable[[Figure], None], *, height: float = INCHES[1]) -> Picture:
    """A picture of what ``draw`` puts into an empty figure, ``height`` inches high."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # signs that the font lacks, as in the name of a run
        figure = Figure(figsize=(INCHES[0], height), layout="constrained")
        draw(figure)
        text, data = io.StringIO(), io.BytesIO()
        vector: Any = FigureCanvasSVG(figure)
        vector.print_svg(text, metadata={"Date": None, "Creator": None})
        raster: Any = FigureCanvasAgg(figure)
        raster.print_png(data)
    svg = text.getvalue()
    return Picture(name=name, title=title, note=note, svg=svg[svg.index("<svg") :], png=data.getvalue())


def plain_text(text: str) -> str:
    """Text as it is: a dollar would begin a formula, and a line of control signs none at all."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)[:80].replace("$", r"\$").lstrip("_") or "?"
