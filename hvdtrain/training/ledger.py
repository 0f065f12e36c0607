"""What the training steps of one `Trainer` took and moved, and what is told of a step and of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from hvdtrain.backends.base import Backend
from hvdtrain.backends.laps import by_phase
from hvdtrain.observe.logger import StepRecord
from hvdtrain.observe.memory_use import memory_in_use
from hvdtrain.training.position import Position


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """What a `Trainer.fit` did, the same on every rank.

    Attributes:
        epochs: Epochs completed, those before a resume included.
        steps: Optimizer steps, those before a resume included; skipped ones count.
        skipped_steps: Steps without an update, because the gradient was not finite.
        train_loss: Mean over the samples of the last epoch (or part of one) that was trained.
        eval_metrics: Of the last evaluation; empty without one.
        samples: Samples trained on in this call.
        train_seconds: Time spent in training steps in this call, without evaluation and checkpoints.
        sent_bytes_per_step: By this rank in this call's training steps (see `hvdtrain.backends.traffic`); NaN if it made none.
            Not the same on every rank where their parts of the exchange differ.
        stopped: Why a callback ended the run before its epochs or steps; "" if none did.
        resumed_from: The checkpoint that this call continued from, or None.
    """

    epochs: int
    steps: int
    skipped_steps: int
    train_loss: float
    eval_metrics: dict[str, float] = field(default_factory=dict)
    samples: int
    train_seconds: float
    sent_bytes_per_step: float
    resumed_from: str | None
    stopped: str = ""


class Ledger:
    """Counts this rank's training steps.

    Args:
        backend: Its traffic is counted, and its device's memory is told.
        position: Where training is.

    Attributes:
        samples: Trained on in these steps, over all ranks.
        seconds: Spent in them.
        lr: Learning rate of the last step; a number of its own, also where the optimizer's is a tensor that a schedule writes into.
        gradient_norm: Of the last step, if it was computed.
    """

    def __init__(self, backend: Backend, position: Position) -> None:
        self._backend, self._position = backend, position
        self.samples, self.seconds = 0, 0.0
        self._steps, self._in_steps_bytes, self._early_bytes = 0, 0.0, backend.traffic.early_bytes
        self.begin_call()
        self.lr: float | Tensor = math.nan
        self.gradient_norm: Tensor | None = None

    @property
    def _sent_bytes(self) -> float:
        return self._in_steps_bytes + self._backend.traffic.early_bytes - self._early_bytes

    def begin_call(self) -> None:
        """A `Trainer.fit` begins, of which `result` will tell."""
        self._before = (self.samples, self.seconds, self._steps, self._sent_bytes)

    @contextmanager
    def step(self, samples: int) -> Iterator[None]:
        """Surround one step over so many samples of all ranks."""
        began, sent = time.perf_counter(), self._backend.traffic.sent_bytes
        yield
        self._in_steps_bytes += self._backend.traffic.sent_bytes - sent
        self._steps += 1
        self.seconds += time.perf_counter() - began
        self.samples += samples

    def record(self, total_steps: float, loss: float, ranks: Sequence[Sequence[float]] | None) -> StepRecord:
        """What a logger is told of the last step.

        Args:
            total_steps: Of the run; infinite if nobody knows.
            loss: The mean since the last record.
            ranks: What `hvdtrain.backends.laps.Laps.take` returned on each rank; None if it was not asked.
        """
        return StepRecord(
            step=self._position.steps,
            total_steps=None if total_steps == math.inf else int(total_steps),
            epoch=self._position.epoch,
            loss=loss,
            lr=float(self.lr),
            samples_per_second=self.samples / self.seconds if self.seconds else math.nan,
            gradient_norm=None if self.gradient_norm is None else float(self.gradient_norm),
            sent_bytes_per_step=self._sent_bytes / self._steps if self._steps else 0.0,
            memory_bytes=memory_in_use(self._backend.device),
            train_seconds=self.seconds,
            phase_seconds=None if ranks is None else by_phase(ranks),
        )

    def result(self, resumed_from: str | None, stopped: str) -> FitResult:
        """What `Trainer.fit` returns, after it was stopped for a reason or because it was done ("")."""
        position = self._position
        samples, seconds, steps, sent_bytes = self._before
        steps, sent_bytes = self._steps - steps, self._sent_bytes - sent_bytes
        return FitResult(
            epochs=position.epoch,
            steps=position.steps,
            skipped_steps=position.skipped_steps,
            train_loss=position.train_loss,
            eval_metrics=dict(position.eval_metrics),
            samples=self.samples - samples,
            train_seconds=self.seconds - seconds,
            sent_bytes_per_step=sent_bytes / steps if steps else math.nan,
            resumed_from=resumed_from,
            stopped=stopped,
        )
