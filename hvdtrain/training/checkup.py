"""The one small exchange that the loop makes now and then: the average loss, and whether anybody wants to stop.

It happens at logged steps, and often enough in between that a request to stop is heard within about a second, however
slow or fast the steps are; all ranks count the same steps, so all make it at the same one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hvdtrain.backends.communicator import Communicator

_NORM_SHARE = 0.005  # of the time, for gradient norms that are only shown


@dataclass(slots=True)
class Tally:
    """A sum of losses over samples, or over what else they are means over."""

    loss_sum: float = 0.0
    weight: float = 0.0

    def add(self, loss: float, weight: float) -> None:
        """Count a ``loss`` that is the mean over ``weight``."""
        self.loss_sum += loss * weight
        self.weight += weight

    @property
    def mean(self) -> float:
        """The mean over the weight; NaN without any."""
        return self.loss_sum / self.weight if self.weight else math.nan


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks know after a checkup.

    Attributes:
        stop: Some rank was asked to stop.
        finish: Some rank wants training to end here as if it had been its last step.
        save: It is time for a checkpoint, by rank 0's clock.
        failed: Something failed on some rank that does not show itself.
        tally: The ranks' tallies since the last checkup, summed.
        shared: What each rank gave to be known by all, in rank order.
    """

    stop: bool
    finish: bool
    save: bool
    failed: bool
    tally: Tally
    shared: tuple[tuple[float, ...], ...] = ()


class Checkup:
    """Decides at which steps ranks talk, and lets them.

    Args:
        communicator: All ranks.
        log_every: Steps between logged steps.
        stop_requested: Whether this rank was asked to stop.
        finish_requested: Whether this rank wants training to end.
        interval_s: The longest time between two checkups, in seconds, as far as whole steps allow.
        failed: Whether something has failed on this rank, beside the training.
        save_every_s: The time between checkpoints, in seconds, after which a checkup says so.
        norm_s: About how long a gradient norm takes, in seconds; the same on every rank.
        clock: Returns seconds; rank 0's decides for all.
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        log_every: int,
        stop_requested: Callable[[], bool],
        finish_requested: Callable[[], bool] = lambda: False,
        interval_s: float = 1.0,
        failed: Callable[[], bool] = lambda: False,
        save_every_s: float = math.inf,
        norm_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._communicator = communicator
        self.log_every = log_every
        self._stop_requested = stop_requested
        self._finish_requested = finish_requested
        self._interval_s = interval_s
        self._failed = failed
        self._save_every_s = save_every_s
        self._norm_s = norm_s
        self._clock = clock
        self._next = self._next_norm = 0
        self._last_step, self._last_time = 0, clock()
        self._saved_at = self._last_time

    def begin(self, step: int) -> None:
        """Start counting at ``step``, the number of steps done; every rank must give the same."""
        self._next = self._next_norm = step + 1
        self._last_step, self._last_time = step, self._clock()
        self._saved_at = self._last_time

    def saved(self) -> None:
        """A checkpoint has been written: the time to the next one begins."""
        self._saved_at = self._clock()

    def logs(self, step: int) -> bool:
        """Whether ``step`` is a logged one."""
        return step % self.log_every == 0

    def due(self, step: int) -> bool:
        """Whether the ranks talk after ``step``, the number of steps done."""
        return step >= self._next or self.logs(step)

    def wants_norm(self, step: int) -> bool:
        """Whether the gradient norm of the step after which ``step`` are done is worth computing only to be shown.

        It is at steps after which the ranks talk, as far as that takes no more than half a percent of the time.
        """
        return self.due(step) and step >= self._next_norm

    def hold(self, step: int, tally: Tally, shared: Sequence[float] = ()) -> Verdict:
        """Exchange; every rank must call it after the same steps, with equally many numbers to be ``shared``."""
        now = self._clock()
        steps = step - self._last_step
        step_s = (now - self._last_time) / steps if steps else math.inf  # how long one takes is not known yet
        self._last_step, self._last_time = step, now
        until_next = max(1, int(self._interval_s / max(step_s, 1e-9)))
        wire = self._communicator.wire
        decides = wire.rank == 0  # its clock does, for all
        mine = [
            float(self._stop_requested()),
            float(self._finish_requested()),
            float(decides and now - self._saved_at >= self._save_every_s),
            float(self._failed()),
            tally.loss_sum,
            tally.weight,
            float(min(until_next, 10_000)) if decides else 0.0,
        ]
        own = len(mine) + wire.rank * len(shared)
        mine += [0.0] * (self._communicator.world_size * len(shared))
        mine[own : own + len(shared)] = shared
        everyone = self._communicator.all_reduce(torch.tensor(mine, dtype=torch.float64)).tolist()
        stop, finish, save, failed, loss_sum, weight, until_next, *rows = everyone
        if self.wants_norm(step):
            step_s = self._interval_s / until_next  # by rank 0's clock
            self._next_norm = step + math.ceil(self._norm_s / (_NORM_SHARE * step_s))
        self._next = step + int(until_next)
        by_rank = [tuple(rows[at : at + len(shared)]) for at in range(0, len(rows), len(shared) or 1)]
        return Verdict(stop > 0, finish > 0, save > 0, failed > 0, Tally(loss_sum, weight), tuple(by_rank))


def norm_seconds(model: nn.Module) -> float:
    """About how long the norm of a model's gradients takes: on a CPU one core reads them at 10 GB/s; a GPU is not waited for."""
    return sum(p.nbytes for p in model.parameters() if p.device.type == "cpu") / 10e9
