"""What the loop reports, as plain numbers, and who listens. Only rank 0 has listeners; the others have a `NullLogger`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """A logged step.

    Attributes:
        step: Optimizer steps done.
        total_steps: Of the whole run; None where nobody knows, as with a stream and no `max_steps`.
        epoch: Epochs completed.
        loss: Mean over the samples of all ranks since the last exchange.
        lr: Of the first parameter group.
        samples_per_second: Over all ranks, since the start.
        gradient_norm: Before clipping; None if nothing computed it.
        sent_bytes_per_step: By rank 0, on average since the start (see `hvdtrain.backends.traffic`); 0 in a world of one.
        memory_bytes: What rank 0's process has of its GPU's memory, or, training on a CPU, its resident set; None where that
            cannot be read.
        train_seconds: In training steps of this process since its start, on rank 0.
        phase_seconds: Seconds of a step since the last logged one, a mean for each rank, by phase (see
            `hvdtrain.backends.laps.PHASES`; on a GPU, of the logged step); None between logged steps.
    """

    step: int
    total_steps: int | None
    epoch: int
    loss: float
    lr: float
    samples_per_second: float
    gradient_norm: float | None = None
    sent_bytes_per_step: float = 0.0
    memory_bytes: int | None = None
    train_seconds: float = 0.0
    phase_seconds: dict[str, list[float]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRecord:
    """An evaluation: mean metrics over the whole evaluation data."""

    step: int
    epoch: int
    metrics: dict[str, float]


class Logger(Protocol):
    """Listens to a run."""

    def log_step(self, record: StepRecord) -> None:
        """Note a step."""
        ...

    def log_eval(self, record: EvalRecord) -> None:
        """Note an evaluation."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class NullLogger:
    """Listens to nothing."""

    def log_step(self, record: StepRecord) -> None:
        """Do nothing."""

    def log_eval(self, record: EvalRecord) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class FanOut:
    """Passes records to several loggers. One that fails (a full disk) is dropped with a warning; training goes on."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._loggers = list(loggers)

    def log_step(self, record: StepRecord) -> None:
        """Pass it to all."""
        self._to_all("log_step", record)

    def log_eval(self, record: EvalRecord) -> None:
        """Pass it to all."""
        self._to_all("log_eval", record)

    def close(self) -> None:
        """Close all."""
        self._to_all("close")

    def _to_all(self, method: str, *record: object) -> None:
        for logger in list(self._loggers):
            try:
                getattr(logger, method)(*record)
            except Exception as error:
                _log.warning("%s failed and gets no more records: %s", type(logger).__name__, error)
                self._loggers.remove(logger)
