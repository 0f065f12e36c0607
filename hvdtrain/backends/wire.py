"""What an engine must be able to do with bytes: a few in-place operations on plain tensors.

A `Wire` joins the ranks of one group. It knows nothing of averages, of booleans or of float16, of shapes that differ
between ranks, or of autograd: `Communicator` adds those, once, for every engine. A new engine implements a `Wire`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from hvdtrain.backends.traffic import Traffic
from hvdtrain.errors import CollectiveError

WireOp = Literal["sum", "min", "max", "product"]


class Work(Protocol):
    """An operation under way."""

    def wait(self) -> object:
        """Block until the result is there; raise what the engine raises."""

    def is_completed(self) -> bool:
        """Say whether `wait` would return at once."""


class Done:
    """An operation that had nothing to wait for."""

    def wait(self) -> object:
        """Return at once."""
        return None

    def is_completed(self) -> bool:
        """Return True."""
        return True


class Then:
    """An operation and what is done with its result, once."""

    def __init__(self, work: Work, finish: Callable[[], object]) -> None:
        self._work = work
        self._finish: Callable[[], object] | None = finish

    def wait(self) -> object:
        """Block until the result is there and used."""
        self._work.wait()
        if self._finish is not None:
            self._finish()
            self._finish = None
        return None

    def is_completed(self) -> bool:
        """Say whether `wait` would return at once."""
        return self._work.is_completed()


class Together:
    """Several operations as one."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = list(works)

    def wait(self) -> object:
        """Block until all results are there."""
        for work in self._works:
            work.wait()
        return None

    def is_completed(self) -> bool:
        """Say whether `wait` would return at once."""
        return all(work.is_completed() for work in self._works)


class Wire(ABC):
    """One group of ranks and the engine's own operations on it.

    Every tensor handed in is dense, contiguous, on `device`, non-empty, and of dtype float32, float64, int8, uint8, int32
    or int64 (for moving operations: any of these). All operations start at once and return a `Work`.

    Args:
        rank: This process's rank within the group.
        ranks: The world's ranks that form the group, in the group's order.
        device: Where tensors must live.

    Attributes:
        traffic: Told of each operation by an engine's own wire; shared by all wires of a backend.
    """

    def __init__(self, rank: int, ranks: Sequence[int], device: torch.device) -> None:
        self.rank = rank
        self.ranks = tuple(ranks)
        self.device = device
        self.traffic = Traffic()
        self._turns: dict[tuple[str, int], threading.Lock] = {}

    @property
    def size(self) -> int:
        """The number of ranks in the group."""
        return len(self.ranks)

    @abstractmethod
    def all_reduce_(self, tensor: Tensor, op: WireOp) -> Work:
        """Reduce ``tensor`` over the ranks, in place."""

    @abstractmethod
    def all_gather_into(self, out: Tensor, tensor: Tensor) -> Work:
        """Fill ``out``, shape (size, \\*tensor.shape), with every rank's ``tensor``."""

    @abstractmethod
    def all_to_all_into(self, out: Tensor, tensor: Tensor, receive: Sequence[int], send: Sequence[int]) -> Work:
        """Send ``send[i]`` leading elements-in-turn of the flat ``tensor`` to rank i; receive into the flat ``out``."""

    @abstractmethod
    def broadcast_(self, tensor: Tensor, src: int) -> Work:
        """Overwrite ``tensor`` on every rank with that of group rank ``src``."""

    @abstractmethod
    def barrier(self) -> Work:
        """Complete once every rank has called it."""

    def reduce_(self, tensor: Tensor, op: WireOp, dst: int) -> Work:
        """Reduce ``tensor`` over the ranks, in place on group rank ``dst``; what the others' holds afterwards is undefined.

        An engine without a native one inherits this: an all-reduce.
        """
        return self.all_reduce_(tensor, op)

    def send_receive(self, sent: Tensor | None, dst: int | None, out: Tensor | None, src: int | None) -> Work:
        """Send ``sent`` to group rank ``dst`` while ``out`` is received from group rank ``src``; either half may be None.

        Both tensors are flat, of uint8, and as long as what is received or sent at the other end. Neither half waits for
        the other, a sent message waits for its receiver, and messages from one rank to another keep their order.
        """
        raise CollectiveError(f"{type(self).__name__} passes no messages between two ranks")

    @property
    def at_once(self) -> Wire:
        """The same operations, for a caller that waits for each before it does anything else: an engine may be quicker then."""
        return self

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Free what the engine holds for this group alone, without waiting for other ranks; an engine may keep it."""

    def turn(self, direction: str, peer: int) -> threading.Lock:
        """The lock of a direction ("to" or "from") to a group rank: whose messages come in parts must not be mixed up."""
        return self._turns.setdefault((direction, peer), threading.Lock())

    def reduce_scatter_into(self, out: Tensor, tensor: Tensor, op: WireOp) -> Work:
        """Reduce ``tensor``, shape (size, \\*out.shape), and keep this rank's part in ``out``.

        An engine without a native one inherits this: an all-reduce of a copy, of which one part is kept.
        """
        whole = tensor.clone()
        self.all_reduce_(whole, op).wait()
        out.copy_(whole[self.rank])
        return Done()


class SelfWire(Wire):
    """The wire of a world of one: nothing moves."""

    def __init__(self, device: torch.device, rank_in_world: int = 0) -> None:
        super().__init__(0, (rank_in_world,), device)

    def all_reduce_(self, tensor: Tensor, op: WireOp) -> Work:
        """Leave ``tensor`` as it is."""
        return Done()

    def all_gather_into(self, out: Tensor, tensor: Tensor) -> Work:
        """Copy ``tensor``."""
        out[0].copy_(tensor)
        return Done()

    def all_to_all_into(self, out: Tensor, tensor: Tensor, receive: Sequence[int], send: Sequence[int]) -> Work:
        """Copy ``tensor``."""
        out.copy_(tensor)
        return Done()

    def broadcast_(self, tensor: Tensor, src: int) -> Work:
        """Leave ``tensor`` as it is."""
        return Done()

    def barrier(self) -> Work:
        """Return at once."""
        return Done()
