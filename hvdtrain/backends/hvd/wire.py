"""Horovod's operations on plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hvdtrain.backends.hvd.library import hvd
from hvdtrain.backends.hvd.pairs import Pairs
from hvdtrain.backends.hvd.waiting import Waiter
from hvdtrain.backends.wire import Then, Wire, WireOp, Work

_NAMES = 512  # names in use for collectives; more in flight wait for the oldest


class HorovodWork:
    """One of Horovod's handles.

    Args:
        waiter: Bounds the wait.
        start: One of Horovod's ``_async`` functions; returns its handle.
        what: The tensor's name, for messages.
        finish: Takes Horovod's output.
    """

    def __init__(
        self, waiter: Waiter, start: Callable[[], int], what: str, finish: Callable[[Any], Any] | None = None
    ) -> None:
        self._waiter, self._what, self._finish = waiter, what, finish
        self._handle = waiter.begin(start, what)
        self._done = False

    def wait(self) -> object:
        """Block until the result is there, at most as long as the waiter has."""
        if not self._done:
            self._waiter.until(lambda: hvd.poll(self._handle), self._what)
            output = hvd.synchronize(self._handle)
            if self._finish is not None:
                self._finish(output)
            self._done = True
        return None

    def is_completed(self) -> bool:
        """Say whether `wait` would return at once."""
        return self._done or bool(hvd.poll(self._handle))


class HorovodWire(Wire):
    """A wire over one of Horovod's process sets.

    Horovod matches operations by name. Here they get numbered names, so that they match by order, as everywhere else;
    a number comes back after `_NAMES` others, so that Horovod's cache can know it.

    Args:
        rank: This process's rank in the world.
        ranks: The world's ranks that form the group.
        device: Where Horovod takes tensors.
        process_set: Horovod's name for the group.
        label: Different for every group.
        waiter: Bounds every wait.
        pairs: Passes messages between two ranks.
        channel: Of this group's messages; different for every group.
    """

    _OPS: ClassVar[dict[str, int]] = {"sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max, "product": hvd.Product}

    def __init__(
        self,
        rank: int,
        ranks: Sequence[int],
        device: torch.device,
        process_set: Any,
        label: str,
        waiter: Waiter,
        pairs: Pairs,
        channel: int,
    ) -> None:
        super().__init__(list(ranks).index(rank), ranks, device)
        self._pairs, self._channel = pairs, channel
        self._waiter = waiter
        self._set = process_set
        self._label = label
        self._count = 0
        self._in_flight: dict[str, HorovodWork] = {}

    def all_reduce_(self, tensor: Tensor, op: WireOp) -> Work:
        """Start hvd.allreduce_async_; 8-bit integers, which it does not reduce, travel as 32-bit ones and wrap around."""
        if tensor.dtype in (torch.uint8, torch.int8):
            wide = tensor.to(torch.int32)
            self.traffic.all_reduce(wide.nbytes, self.size)
            return self._start(
                "allreduce",
                lambda name: hvd.allreduce_async_(wide, name=name, op=self._OPS[op], process_set=self._set),
                tensor.copy_,
            )
        self.traffic.all_reduce(tensor.nbytes, self.size)
        return self._start(
            "allreduce", lambda name: hvd.allreduce_async_(tensor, name=name, op=self._OPS[op], process_set=self._set)
        )

    def all_gather_into(self, out: Tensor, tensor: Tensor) -> Work:
        """Start hvd.allgather_async."""
        self.traffic.all_gather(tensor.nbytes, self.size)
        flat = tensor.reshape(-1)
        return self._start(
            "allgather",
            lambda name: hvd.allgather_async(flat, name=name, process_set=self._set),
            lambda output: out.copy_(output.view(out.shape)),
        )

    def all_to_all_into(self, out: Tensor, tensor: Tensor, receive: Sequence[int], send: Sequence[int]) -> Work:
        """Start hvd.alltoall_async."""
        self.traffic.all_to_all([count * tensor.itemsize for count in send], self.rank)
        splits = torch.tensor(list(send), dtype=torch.int32)
        return self._start(
            "alltoall",
            lambda name: hvd.alltoall_async(tensor, splits=splits, name=name, process_set=self._set),
            lambda output: out.copy_(output[0] if isinstance(output, tuple) else output),
        )

    def broadcast_(self, tensor: Tensor, src: int) -> Work:
        """Start hvd.broadcast_async_."""
        self.traffic.rooted(tensor.nbytes, self.size)
        root = self.ranks[src]
        return self._start(
            "broadcast", lambda name: hvd.broadcast_async_(tensor, root, name=name, process_set=self._set)
        )

    def barrier(self) -> Work:
        """Start an all-reduce of one element: Horovod's own barrier cannot be waited for with a bound."""
        return self.all_reduce_(torch.zeros(1, dtype=torch.int32, device=self.device), "sum")

    def send_receive(self, sent: Tensor | None, dst: int | None, out: Tensor | None, src: int | None) -> Work:
        """Pass them beside Horovod, which has no messages between two ranks; GPU tensors come through the CPU."""
        self.traffic.message(0 if sent is None else sent.nbytes)
        to, source = (None if peer is None else self.ranks[peer] for peer in (dst, src))
        on_cpu = self.device.type == "cpu"
        room = out if out is None or on_cpu else torch.empty_like(out, device="cpu")
        work = self._pairs.send_receive(None if sent is None else sent.cpu(), to, room, source, self._channel)
        return work if out is None or room is None or on_cpu else Then(work, lambda: out.copy_(room))

    def reduce_scatter_into(self, out: Tensor, tensor: Tensor, op: WireOp) -> Work:
        """Start hvd.reducescatter_async for sums; for the rest Horovod has none."""
        if op != "sum" or tensor.dtype in (torch.uint8, torch.int8):
            return super().reduce_scatter_into(out, tensor, op)
        self.traffic.reduce_scatter(tensor.nbytes, self.size)
        flat = tensor.reshape(self.size, -1)
        return self._start(
            "reducescatter",
            lambda name: hvd.reducescatter_async(flat, name=name, op=hvd.Sum, process_set=self._set),
            lambda output: out.copy_(output.view(out.shape)),
        )

    def _start(self, kind: str, start: Callable[[str], int], finish: Callable[[Any], Any] | None = None) -> HorovodWork:
        name = f"hvdtrain.{self._label}.{self._count % _NAMES}"
        self._count += 1
        earlier = self._in_flight.pop(name, None)
        if earlier is not None:
            earlier.wait()
        work = HorovodWork(self._waiter, lambda: start(name), f"{kind} {name!r}", finish)
        self._in_flight[name] = work
        return work
