"""Ranks as threads of one process: the seam's logic in milliseconds, beside, never instead of, real launchers.

A `ThreadWire` moves tensors between threads, so that a `Communicator` and what is built on it can be run by many ranks in
a unit test. It proves nothing about engines, processes or failures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.wire import Done, Wire, WireOp, Work

T = TypeVar("T")

_TIMEOUT_S = 30.0


def run_ranks(world_size: int, body: Callable[[Communicator], T], *, check: bool = False) -> list[T]:
    """Run ``body`` on every rank at once.

    Args:
        world_size: Number of ranks.
        body: Gets the rank's communicator.
        check: As for `Communicator`.

    Returns:
        What each rank returned, in rank order; the first rank's error is raised.
    """
    table = _Table(world_size)

    def rank(number: int) -> T:
        try:
            return body(Communicator(ThreadWire(number, table), check=check))
        except BaseException:
            table.abort()  # the others need not wait
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(rank, number) for number in range(world_size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=_is_victim):
        raise error
    return [future.result() for future in futures]


def _is_victim(error: BaseException) -> bool:
    """Whether another rank's end is the cause."""
    return isinstance(error.__cause__ or error, threading.BrokenBarrierError)


class _Table:
    """Where ranks lay down what they send."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=_TIMEOUT_S)
        self.laid: list[Tensor] = [torch.empty(0)] * world_size
        self._changed = threading.Condition()
        self._mail: dict[tuple[int, int], list[Tensor]] = {}

    def put(self, src: int, dst: int, tensor: Tensor) -> None:
        """Lay down a message."""
        with self._changed:
            self._mail.setdefault((src, dst), []).append(tensor)
            self._changed.notify_all()

    def until(self, src: int, dst: int, *, there: bool) -> None:
        """Wait until a message between two ranks is there, or all are taken."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: self.barrier.broken or bool(self._mail.get((src, dst))) == there, timeout=_TIMEOUT_S
            )
        if not came or self.barrier.broken:
            raise threading.BrokenBarrierError

    def take(self, src: int, dst: int) -> Tensor:
        """Take the oldest message between two ranks."""
        with self._changed:
            tensor = self._mail[src, dst].pop(0)
            self._changed.notify_all()
        return tensor

    def abort(self) -> None:
        """Let nobody wait any more."""
        self.barrier.abort()
        with self._changed:
            self._changed.notify_all()


class ThreadWire(Wire):
    """Operations between threads; each is done when it returns.

    Args:
        rank: This thread's rank.
        table: The same for all.
    """

    def __init__(self, rank: int, table: _Table) -> None:
        super().__init__(rank, range(len(table.laid)), torch.device("cpu"))
        self._table = table

    def all_reduce_(self, tensor: Tensor, op: WireOp) -> Work:
        """Reduce in rank order."""
        everyone = torch.stack(self._exchange(tensor))
        reduced = {
            "sum": lambda: everyone.sum(0, dtype=everyone.dtype),
            "min": lambda: everyone.amin(0),
            "max": lambda: everyone.amax(0),
            "product": lambda: everyone.prod(0, dtype=everyone.dtype),
        }[op]()
        tensor.copy_(reduced)
        return Done()

    def all_gather_into(self, out: Tensor, tensor: Tensor) -> Work:
        """Copy everybody's."""
        out.copy_(torch.stack(self._exchange(tensor)).view_as(out))
        return Done()

    def all_to_all_into(self, out: Tensor, tensor: Tensor, receive: Sequence[int], send: Sequence[int]) -> Work:
        """Copy this rank's part of everybody's, all of one size on a rank or all told by ``send``."""
        cuts = torch.tensor([0, *send]).cumsum(0)
        theirs, everyone = self._exchange(cuts), self._exchange(tensor)
        parts = [whole[cut[self.rank] : cut[self.rank + 1]] for whole, cut in zip(everyone, theirs, strict=True)]
        out.copy_(torch.cat(parts))
        return Done()

    def broadcast_(self, tensor: Tensor, src: int) -> Work:
        """Copy the root's."""
        tensor.copy_(self._exchange(tensor)[src])
        return Done()

    def barrier(self) -> Work:
        """Meet."""
        self._table.barrier.wait()
        return Done()

    def send_receive(self, sent: Tensor | None, dst: int | None, out: Tensor | None, src: int | None) -> Work:
        """Lay down what is sent, copy what is received, and wait until the first is taken."""
        if sent is not None and dst is not None:
            self._table.put(self.rank, dst, sent.clone())
        if out is not None and src is not None:
            self._table.until(src, self.rank, there=True)
            out.copy_(self._table.take(src, self.rank))
        if sent is not None and dst is not None:
            self._table.until(self.rank, dst, there=False)
        return Done()

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._table.laid[self.rank] = tensor.detach().clone()
        self._table.barrier.wait()
        everyone = list(self._table.laid)
        self._table.barrier.wait()
        return everyone
