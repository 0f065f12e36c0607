"""What is timed: the collectives of a backend, and the copy of memory that they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from hvdtrain.backends.base import Backend


class Calls(Protocol):
    """Something that has collectives.

    Attributes:
        rank: This process's number.
        size: How many there are.
    """

    rank: int
    size: int

    def prepared(self, collective: str, size: int) -> Callable[[], object]:
        """A call that may be repeated, on an array of ``size`` bytes of float32 zeros."""

    def most(self, seconds: float) -> float:
        """The largest of all ranks' numbers, on every rank."""


class BackendCalls:
    """A started backend's collectives, as users call them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.rank, self.size = backend.rank, backend.world_size

    def prepared(self, collective: str, size: int) -> Callable[[], object]:
        """See `Calls`."""
        backend = self._backend
        whole = torch.zeros(size // 4, device=backend.device)
        parts = list(whole.chunk(self.size)) if len(whole) >= self.size else [whole]
        calls: dict[str, Callable[[], object]] = {
            "all-reduce": lambda: backend.all_reduce_(whole),
            "all-gather": lambda: backend.all_gather(parts[0]),
            "reduce-scatter": lambda: backend.reduce_scatter(parts),
            "broadcast": lambda: backend.broadcast_(whole),
            "all-to-all": lambda: backend.all_to_all(parts),
        }
        call = calls[collective]
        if backend.device.type != "cuda":
            return call

        def whole_call() -> None:
            call()
            torch.cuda.synchronize(backend.device)

        return whole_call

    def most(self, seconds: float) -> float:
        """See `Calls`."""
        return self._backend.all_reduce(torch.tensor(seconds, dtype=torch.float64), "max").item()


class Copy:
    """One process that copies memory: what no exchange through memory can beat."""

    rank, size = 0, 1

    def prepared(self, collective: str, size: int) -> Callable[[], object]:
        """A copy of ``size`` bytes; there is no collective."""
        source, target = torch.zeros(size // 4), torch.zeros(size // 4)
        return lambda: target.copy_(source)

    def most(self, seconds: float) -> float:
        """Its own."""
        return seconds
