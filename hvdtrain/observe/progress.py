"""How far the run is: a live line on a terminal, plain lines every few seconds elsewhere.

Plain lines come as often as records do, at most every few seconds; `Trainer(progress=)` sends some between logged steps.
"""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hvdtrain.observe.logger import EvalRecord, StepRecord
from hvdtrain.observe.quantities import in_bytes


class ProgressLogger:
    """Shows epoch, step, loss, samples per second and the time left.

    Args:
        console: Where to.
        epochs: Of the whole run.
        every_s: Seconds between plain lines.
    """

    def __init__(self, console: Console, epochs: int, every_s: float = 5.0) -> None:
        self._console = console
        self._epochs = epochs
        self._every_s = every_s
        self._last = -math.inf  # a clock that counts from the start of the machine may be near zero
        self._began: tuple[float, int] | None = None
        self._bar: Progress | None = None

    def log_step(self, record: StepRecord) -> None:
        """Show a step."""
        text = (
            f"epoch {min(record.epoch + 1, self._epochs)}/{self._epochs}  loss {record.loss:.4f}  "
            f"{record.samples_per_second:,.0f} samples/s"
        )
        if record.sent_bytes_per_step:
            text += f"  {in_bytes(record.sent_bytes_per_step)}/step"
        if self._console.is_terminal:
            self._show_bar(record, text)
            return
        now = time.monotonic()
        if self._began is None:
            self._began = (now, record.step)
        total = record.total_steps
        if now - self._last < self._every_s and (total is None or record.step < total):
            return
        self._last = now
        began, first = self._began
        if record.step > first and total is not None:
            text += f"  {(now - began) / (record.step - first) * (total - record.step):.0f} s left"
        of_all = "" if total is None else f"/{total}"
        self._console.print(f"step {record.step}{of_all}  {text}", highlight=False)

    def log_eval(self, record: EvalRecord) -> None:
        """Show an evaluation."""
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in record.metrics.items())
        when = f"epoch {record.epoch}/{self._epochs} " if self._epochs else ""
        self._console.print(f"{when}evaluated: {metrics}", highlight=False)

    def close(self) -> None:
        """Remove the live line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_bar(self, record: StepRecord, text: str) -> None:
        if self._bar is None:
            known = record.total_steps is not None
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}" + ("/{task.total:.0f}" if known else "")),
                BarColumn(),
                TextColumn("{task.description}"),
                *([TimeRemainingColumn()] if known else []),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task(text, total=record.total_steps)
        self._bar.update(self._bar.task_ids[0], completed=record.step, description=text)
