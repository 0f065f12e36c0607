"""Collectives to and from one rank: `reduce`, `gather`, `scatter`.

What they move comes to, or from, that rank alone; small headers (dtype and shape) go to all, so that what does not fit is
an error on every rank and not on one of them. They move numbers, and none can be differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from hvdtrain.backends import extremes
from hvdtrain.backends.forms import (
    HEADER,
    ReduceOp,
    as_bytes,
    by_rank,
    check_tensor,
    header,
    numel,
    pickled,
    read_header,
    refuse_gradient,
    unpickled,
)
from hvdtrain.backends.member import Member
from hvdtrain.errors import CollectiveError

T = TypeVar("T")

_REFUSAL_BYTES = 512  # of the sentence by which the source of a scatter tells all ranks that its list is wrong


class Rooted(Member):
    """Collectives in which one rank has, or gets, everything."""

    def reduce(self, tensor: Tensor, dst: int = 0, op: ReduceOp = "sum") -> Tensor | None:
        """Reduce a tensor over the ranks; rank ``dst`` gets the result.

        An engine without a reduction to one rank (Horovod) does an all-reduce, of which the others drop the result.

        Args:
            tensor: Any shape, the same on every rank. Left alone.
            dst: A rank of this group.
            op: As for `all_reduce`.

        Returns:
            On ``dst`` a new tensor of the same shape, dtype and device; None on the others.

        Raises:
            CollectiveError: The operation is undefined for the dtype, ``tensor`` requires grad, or the engine failed or
                timed out.
        """
        wire_op = self._wire_op("reduce", tensor, op)
        refuse_gradient("reduce", tensor)
        self._check_rank("reduce", dst, "dst")
        wire, what = self.wire, f"reduce(op={op}, dst={dst})"
        self._agree(what, "", tensor)
        buffer = self._encode(tensor)
        with self._guard(what, tensor):
            if buffer.numel():
                extremes.reduce_(wire, buffer, wire_op, dst).wait()
        return self._decode(buffer, tensor, op) if wire.rank == dst else None

    def gather(self, tensor: Tensor, dst: int = 0) -> list[Tensor] | None:
        """Collect every rank's tensor on rank ``dst``.

        Args:
            tensor: Any shape, which may differ between ranks; the dtype may not. Left alone.
            dst: A rank of this group, the same on every rank.

        Returns:
            On ``dst`` new tensors, one a rank, in rank order, on the device of ``tensor``; None on the others.

        Raises:
            CollectiveError: On every rank: the dtypes or ``dst`` differ. Or ``tensor`` requires grad, or the engine failed
                or timed out.
        """
        check_tensor("gather", tensor)
        refuse_gradient("gather", tensor)
        self._check_rank("gather", dst, "dst")
        wire, what = self.wire, f"gather(dst={dst})"
        self._agree(what, "", None)
        forms = self._compare_headers(tensor, dst)
        width = tensor.element_size()
        sizes = [numel(shape) * width for _, shape in forms]
        send, receive = [0] * wire.size, [0] * wire.size
        send[dst] = sizes[wire.rank]
        if wire.rank == dst:
            receive = sizes
        out = torch.empty(sum(receive), dtype=torch.uint8, device=wire.device)
        if sum(sizes):
            with self._guard(what, tensor):
                wire.all_to_all_into(out, as_bytes(tensor, wire.device), receive, send).wait()
        if wire.rank != dst:
            return None
        parts = zip(out.split(sizes), forms, strict=True)
        return [part.clone().view(tensor.dtype).reshape(shape).to(tensor.device) for part, (_, shape) in parts]

    def gather_object(self, obj: T, dst: int = 0) -> list[T] | None:
        """Collect every rank's object (pickled) on rank ``dst``, in rank order; the others get None.

        The own object of ``dst`` is returned to it unchanged.
        """
        gathered = self.gather(pickled(obj, self._key), dst)
        if gathered is None:
            return None
        return [obj if i == dst else cast(T, unpickled(data, self._key)) for i, data in enumerate(gathered)]

    def scatter(self, tensors: Sequence[Tensor] | None, src: int = 0) -> Tensor:
        """Give the i-th of rank ``src``'s tensors to rank i.

        Args:
            tensors: On ``src`` as many as there are ranks, of one dtype; shapes are free. Ignored elsewhere: pass None.
            src: A rank of this group, the same on every rank.

        Returns:
            This rank's part, a new tensor: on the CPU if ``src`` has it there, on this rank's GPU if it lies on a GPU.

        Raises:
            CollectiveError: On every rank: ``src`` holds no such list. Or the engine failed or timed out.
        """
        self._check_rank("scatter", src)
        wire = self.wire
        parts, plan = self._plan_scatter(tensors) if wire.rank == src else ([], _no_plan(wire.size))
        plan = self._start_broadcast(plan, src, "scatter").wait()
        refusal = bytes(plan[:_REFUSAL_BYTES].tolist()).rstrip(b"\0").decode(errors="replace")
        if refusal:
            raise CollectiveError(refusal)
        rows = plan[_REFUSAL_BYTES:].view(torch.int64).reshape(wire.size, HEADER + 1).tolist()
        forms = [read_header(row[1:]) for row in rows]
        sizes = [numel(shape) * dtype.itemsize for dtype, shape in forms]
        receive, send = [0] * wire.size, [0] * wire.size
        receive[src] = sizes[wire.rank]
        flat = torch.empty(0, dtype=torch.uint8, device=wire.device)
        if wire.rank == src:
            send, flat = sizes, torch.cat([as_bytes(part, wire.device) for part in parts])
        out = torch.empty(sum(receive), dtype=torch.uint8, device=wire.device)
        dtype, shape = forms[wire.rank]
        if sum(sizes):
            with self._guard(f"scatter(src={src})", out):
                wire.all_to_all_into(out, flat, receive, send).wait()
        return out.view(dtype).reshape(shape).to(arrival(on_gpu=bool(rows[wire.rank][0])))

    def _plan_scatter(self, tensors: Sequence[Tensor] | None) -> tuple[list[Tensor], Tensor]:
        """What the source of a scatter will send, and the same for the other ranks: its forms, or why it cannot."""
        plan = _no_plan(self.wire.size)
        try:
            if tensors is None:
                raise CollectiveError("scatter needs one tensor a rank on the rank that has them, src; got None there")
            parts = self._one_dtype("scatter", tensors)
        except CollectiveError as error:
            text = str(error).encode()[:_REFUSAL_BYTES]
            plan[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
            return [], plan
        rows = [torch.cat([torch.tensor([int(part.is_cuda)]), header(part)]) for part in parts]
        plan[_REFUSAL_BYTES:] = torch.cat(rows).view(torch.uint8)
        return parts, plan

    def _compare_headers(self, tensor: Tensor, dst: int) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        """Every rank's dtype and shape; an error on every rank if the dtypes or the destinations differ."""
        wire = self.wire
        mine = torch.cat([torch.tensor([dst]), header(tensor)]).to(wire.device)
        out = torch.empty((wire.size, mine.numel()), dtype=torch.int64, device=wire.device)
        with self._guard(f"gather(dst={dst})", tensor):
            wire.at_once.all_gather_into(out, mine).wait()
        rows = out.tolist()
        forms = [read_header(row[1:]) for row in rows]
        for what, values in (("dst", [row[0] for row in rows]), ("dtypes", [dtype for dtype, _ in forms])):
            if len(set(values)) > 1:
                differ = "differs" if what == "dst" else "differ"
                raise CollectiveError(f"gather: {what} {differ} between ranks: {by_rank(wire.ranks, values)}")
        return forms


def arrival(*, on_gpu: bool) -> torch.device:
    """Where a tensor that another rank had on a GPU, or on the CPU, belongs here: the backend made its GPU the current one."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if on_gpu and torch.cuda.is_available()
        else torch.device("cpu")
    )


def _no_plan(size: int) -> Tensor:
    return torch.zeros(_REFUSAL_BYTES + 8 * size * (HEADER + 1), dtype=torch.uint8)
