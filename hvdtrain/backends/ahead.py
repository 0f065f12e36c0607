"""A number of each rank whose sum is wanted a step later: it travels with the gradients, and costs no message of its own.

Who still has samples, for one: each rank says before a step how many it will have in the next one, and all know the sum
when they ask for that. Where no gradients were exchanged in between (an evaluation, a loop that gives a step up), the
numbers are summed when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hvdtrain.backends.communicator import Communicator


class Ahead:
    """One number of this rank, and later the sum over all ranks; see `hvdtrain.backends.base.Backend.ahead`.

    Args:
        number: A whole number from 0; the ranks' sum must be less than 2**24, which float32 holds.
        communicator: All ranks.
    """

    def __init__(self, number: int, communicator: Communicator) -> None:
        self.number = number
        self._communicator = communicator
        self._total: int | None = number if communicator.wire.size == 1 else None
        self._arriving: _Arriving | None = None
        self._aboard = False

    def board(self) -> bool:
        """Whether it travels with the exchange that begins now: with one at a time, and until it has arrived."""
        free = not self._aboard and self._total is None
        self._aboard |= free
        return free

    def arrive(self, total: Tensor) -> None:
        """The exchange that it was aboard of is done; ``total`` has one element, on any device."""
        self._arriving = _Arriving(total)

    def lose(self) -> None:
        """The exchange that it was aboard of was given up, on every rank."""
        self._aboard = False

    def total(self) -> int:
        """Return the ranks' sum; every rank must call it at the same place."""
        if self._total is None:
            if self._arriving is not None:
                self._total = round(self._arriving.value())
            else:
                number = torch.tensor(self.number, dtype=torch.int64)
                self._total = int(self._communicator.all_reduce(number))
        return self._total


class _Arriving:
    """A number on its way from a GPU, where it is waited for no longer than it needs itself."""

    def __init__(self, number: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if number.device.type != "cuda":
            self._host = number.detach().clone()
            return
        self._host = torch.empty(number.shape, dtype=number.dtype, pin_memory=True)
        self._host.copy_(number.detach(), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def value(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)
