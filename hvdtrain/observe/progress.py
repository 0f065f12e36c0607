"""How far the run is: a live line on a terminal or in a notebook, plain lines every few seconds elsewhere.

Plain lines come as often as records do, at most every few seconds; `Trainer(progress=)` sends some between logged steps.
A live line is never longer than the terminal is wide: what matters least is left out first.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hvdtrain import notebook
from hvdtrain.observe.logger import EvalRecord, StepRecord
from hvdtrain.observe.quantities import in_bytes, in_duration

_BAR_CELLS = 16
_GAP = "  "
_LEAST = 9  # the rank of the bar
_CELL_EVERY_S = 0.2  # each is a message to the browser


class ProgressLogger:
    """Shows epoch, step, loss, samples per second, learning rate, gradient norm, memory, bytes sent and the time left.

    A `Trainer`'s ``logger`` on rank 0. Its `with` block, or `close`, ends the live line::

        with hvdtrain.ProgressLogger(epochs=3) as progress:
            trainer = hvdtrain.Trainer(..., logger=progress if backend.rank == 0 else None)

    Args:
        epochs: Of the whole run.
        console: Where to, of rich; None for standard output, or the cell of a notebook, that of `spawn`'s caller too.
        every_s: Seconds between plain lines.
    """

    def __init__(self, epochs: int, console: Console | None = None, every_s: float = 5.0) -> None:
        self._console = console or Console(soft_wrap=True, markup=False, emoji=False)
        self._epochs = epochs
        self._every_s = every_s
        self._last = -math.inf  # a clock that counts from the start of the machine may be near zero
        self._began: tuple[float, int] | None = None
        self._live: _Line | None = None
        self._norm: float | None = None

    def log_step(self, record: StepRecord) -> None:
        """Show a step."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, record.step)
        if record.gradient_norm is not None:
            self._norm = record.gradient_norm
        if self._live is None:
            self._live = _line_of(self._console)
        if self._live is not None:
            self._live.show(self._fields(record, now), record.step / record.total_steps if record.total_steps else None)
            return
        total = record.total_steps
        if now - self._last < self._every_s and (total is None or record.step < total):
            return
        self._last = now
        text = _GAP.join(text for _, text in self._fields(record, now))
        self._console.print(text, highlight=False, soft_wrap=True)

    def log_eval(self, record: EvalRecord) -> None:
        """Show an evaluation."""
        metrics = _GAP.join(f"{name} {value:.4f}" for name, value in record.metrics.items())
        when = f"epoch {record.epoch}/{self._epochs} " if self._epochs else ""
        self._console.print(f"{when}evaluated: {metrics}", highlight=False, markup=False, emoji=False)

    def __enter__(self) -> ProgressLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the live line: a terminal's is removed, a cell's stays."""
        if self._live is not None:
            self._live.close()
            self._live = None

    def _fields(self, record: StepRecord, now: float) -> list[tuple[int, str]]:
        """What there is to show, in order, each with its rank: the highest is left out first."""
        total = record.total_steps
        fields = [
            (1, f"step {record.step}" + ("" if total is None else f"/{total}")),
            (7, f"epoch {min(record.epoch + 1, self._epochs)}/{self._epochs}"),
            (0, f"loss {record.loss:.4f}"),
            (2, f"{record.samples_per_second:,.0f} samples/s"),
            (4, f"lr {record.lr:.3g}"),
        ]
        if self._norm is not None:
            fields.append((5, f"grad {self._norm:.3g}"))
        if record.memory_bytes is not None:
            fields.append((6, f"mem {in_bytes(record.memory_bytes)}"))
        if record.sent_bytes_per_step:
            fields.append((8, f"sent {in_bytes(record.sent_bytes_per_step)}/step"))
        began, first = self._began or (now, record.step)
        if record.step > first and total is not None:
            seconds = (now - began) / (record.step - first) * (total - record.step)
            fields.append((3, f"{in_duration(seconds)} left"))
        return fields


def fitted(fields: Iterable[tuple[int, str]], width: int) -> str:
    """Join texts with gaps, without those of the highest ranks that have no room; the last one is cut."""
    kept = list(fields)
    while len(kept) > 1 and len(_GAP.join(text for _, text in kept)) > width:
        kept.remove(max(kept))
    return _GAP.join(text for _, text in kept)[: max(0, width)]


class _Line(Protocol):
    """A line that is shown in the place of the one before."""

    def show(self, fields: list[tuple[int, str]], done: float | None) -> None: ...

    def close(self) -> None: ...


def _line_of(console: Console) -> _Line | None:
    """A line in place, where there can be one."""
    if notebook.show_in_callers_cell is not None and console.file is sys.stdout:
        return _NotebookLine(notebook.show_in_callers_cell)
    if console.is_jupyter:
        return _NotebookLine(notebook.CellLine().show)
    return _TerminalLine(console) if console.is_terminal and not console.is_dumb_terminal else None


class _TerminalLine:
    """The last line of a terminal, with a bar where there is room; others are printed above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._fields: list[tuple[int, str]] = []
        self._full, self._empty = "━─" if console.encoding.startswith("utf") else "#-"
        self._live = Live(console=console, get_renderable=self._text, transient=True, refresh_per_second=4)

    def show(self, fields: list[tuple[int, str]], done: float | None) -> None:
        cells = [] if done is None else [(_LEAST, self._bar(done))]
        self._fields = [*fields[:1], *cells, *fields[1:]]
        if not self._live.is_started:
            self._live.start(refresh=True)

    def close(self) -> None:
        self._live.stop()

    def _bar(self, done: float) -> str:
        full = round(min(1.0, done) * _BAR_CELLS)
        return self._full * full + self._empty * (_BAR_CELLS - full)

    def _text(self) -> Text:
        """Made anew at each refresh: the window may have another width by then."""
        return Text(fitted(self._fields, self._console.width), no_wrap=True, overflow="crop")


class _NotebookLine:
    """An output of the cell that is replaced; of the cell that called `spawn`, on one of its ranks."""

    def __init__(self, show: Callable[[str], object]) -> None:
        self._show = show
        self._text = ""
        self._last = -math.inf

    def show(self, fields: list[tuple[int, str]], done: float | None) -> None:
        self._text = _GAP.join(text for _, text in fields)
        now = time.monotonic()
        if now - self._last >= _CELL_EVERY_S:
            self._last = now
            self._show(self._text)

    def close(self) -> None:
        """Leave it: it says how far the run came."""
        self._show(self._text)
