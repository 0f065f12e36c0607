"""Where the time of training steps goes: laps of a stopwatch, named after the phase that ends.

On a CPU each lap is read from a clock. On a GPU, whose work is only queued, a lap is an event in the queue, and what is told is
the time between events: a phase that the GPU did not have to wait for takes none. Events are read only by `Laps.take`, so
that steps in between do not wait for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

PHASES = ("data", "forward", "backward", "exchange", "optimizer", "other")
"""What `Laps` tells apart.

data: waiting for samples, and moving them to the device. forward: the task's loss. backward: gradients of it, and what of the
exchange is hidden behind it. exchange: the rest of the exchange, which the rank waits for, and with it for slower ranks.
optimizer: clipping and the update. other: callbacks, logs, checkpoints.
"""


def no_lap(phase: str) -> None:
    """Measure nothing."""


class HasLap(Protocol):
    """A `hvdtrain.Replica`, which says when its phases end."""

    lap: Callable[[str], None]


class Laps:
    """Measures phases of the steps of one rank.

    Args:
        device: Where the model is.

    Attributes:
        listeners: Called with each phase when it ends, in every step, and with "" by `skip`.
    """

    def __init__(self, device: torch.device) -> None:
        self._queued = device.type == "cuda"
        self._on = True
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._steps = 0
        self._last = 0.0
        self._events: list[tuple[str, Any]] = []
        self.listeners: list[Callable[[str], None]] = []

    @classmethod
    def of(cls, replica: HasLap, device: torch.device) -> Laps:
        """Laps of a replica's steps, whose own it tells."""
        laps = cls(device)
        replica.lap = laps.lap
        return laps

    def begin(self, *, timed: bool) -> None:
        """A step begins, right after the last one; on a GPU it is measured only if ``timed``."""
        self._on = timed or not self._queued
        if self._on:
            self._steps += 1
            if self._queued:
                self._events.append(("", _event()))

    def skip(self) -> None:
        """What lies behind belongs to no step: an evaluation between epochs, say."""
        for listener in self.listeners:
            listener("")
        self._last = time.perf_counter()
        if self._events:
            self._events.append(("", _event()))

    def lap(self, phase: str) -> None:
        """A phase ends, and the next begins."""
        for listener in self.listeners:
            listener(phase)
        if not self._on:
            return
        if self._queued:
            self._events.append((phase, _event()))
            return
        now = time.perf_counter()
        self._seconds[phase] += now - self._last
        self._last = now

    def take(self, steps: int | None = None) -> list[float]:
        """Seconds of each of `PHASES` in a step, a mean over the steps measured since the last call; zeros if none was.

        On a GPU it waits until the steps are over there.

        Args:
            steps: How many there were; None for as many as began.
        """
        if self._events:
            self._events[-1][1].synchronize()
            for (_, before), (phase, event) in zip(self._events, self._events[1:], strict=False):
                if phase:
                    self._seconds[phase] += before.elapsed_time(event) / 1e3
            self._events.clear()
        steps = max(1, self._steps if steps is None else steps)
        means = [self._seconds[phase] / steps for phase in PHASES]
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._steps = 0
        return means


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def by_phase(ranks: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """What `Laps.take` returned on each rank, by phase, in microseconds' precision; a phase that no rank had is left out."""
    found = {phase: [round(row[at], 6) for row in ranks] for at, phase in enumerate(PHASES)}
    return {phase: seconds for phase, seconds in found.items() if any(seconds)}
