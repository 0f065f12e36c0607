"""Collectives with one meaning on every engine.

Names and meanings are those of `torch.distributed`; results are new tensors and arguments are left alone, but for the
two names that end in an underscore. What is uniform here and is not between the engines: averages (never of integers,
never overflowing in float16), bool, float16 and bfloat16 (carried in float32), shapes that differ between ranks, empty,
zero-dimensional and non-contiguous tensors, tensors on another device than the engine's, and differentiation: the
result of a tensor that requires grad can be differentiated.

Collectives to and from one rank are in `rooted`, messages between two ranks in `messages`, and what all of them are made
of in `member`. This is not the path of the gradients: a replica hands those to its engine directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor

from hvdtrain.backends import extremes
from hvdtrain.backends.forms import (
    ReduceOp,
    check_tensor,
    differentiated,
    header,
    numel,
    pickled,
    read_header,
    refuse_gradient,
    unpickled,
)
from hvdtrain.backends.member import Pending
from hvdtrain.backends.messages import Messages
from hvdtrain.backends.rooted import Rooted
from hvdtrain.errors import CollectiveError

T = TypeVar("T")


class Communicator(Rooted, Messages):
    """Collectives over the ranks of one `Wire`. Every rank of the group must call each, in the same order.

    Messages between two ranks (`send`, `recv`, `sendrecv`) need those two alone.

    Args:
        wire: The engine's operations; None until the backend has started.
        watch: Told what this rank is waiting for, so that a time-out can name the ranks that are missing.
        check: Compare operation, dtype and shape over the ranks before each collective (one small exchange more), so
            that a mismatch is an error that names the ranks instead of a time-out or of wrong numbers.
        label: How messages name this group.
    """

    # -- reductions ---------------------------------------------------------------------------------------------------

    @overload
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum", *, async_op: Literal[False] = False) -> Tensor: ...
    @overload
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum", *, async_op: Literal[True]) -> Pending[Tensor]: ...
    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum", *, async_op: bool = False) -> Tensor | Pending[Tensor]:
        """Reduce a tensor over the ranks; every rank gets the result.

        Args:
            tensor: Any shape, the same on every rank. Left alone. bool: sum and max are "any", min and product "all".
            op: "sum", "mean" (floating point and complex only), "min", "max" (a NaN of any rank is the result) or "product".
            async_op: Return a `Pending` at once; its `wait` returns the result.

        Returns:
            A new tensor of the same shape, dtype and device. If ``tensor`` requires grad, the result can be
            differentiated (sum and mean): the gradient is the sum (mean) of the ranks' gradients, as in torch.

        Raises:
            CollectiveError: The operation is undefined for the dtype, or the engine failed or timed out.
        """
        if differentiated(tensor):
            if async_op or op not in ("sum", "mean"):
                raise CollectiveError(
                    f"all_reduce(op={op!r}, async_op={async_op}) of a tensor that requires grad cannot be differentiated; "
                    "pass tensor.detach(), or use op 'sum' or 'mean' with async_op=False"
                )
            return cast(Tensor, _AllReduce.apply(tensor, self, op, "all_reduce"))
        pending = self._start_all_reduce(tensor, op, "all_reduce", at_once=not async_op)
        return pending if async_op else pending.wait()

    def all_reduce_(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Reduce over the ranks and write the result into ``tensor``, which is returned."""
        check_tensor("all_reduce_", tensor)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise CollectiveError(
                "all_reduce_ would overwrite a tensor that requires grad; use all_reduce, or torch.no_grad()"
            )
        if tensor.dtype in (torch.float32, torch.float64) and self._direct(tensor):  # no copy
            wire_op = self._wire_op("all_reduce_", tensor, op)
            self._agree("all_reduce_", op, tensor)
            with self._guard("all_reduce_", tensor, op):
                extremes.all_reduce_(self.wire.at_once, tensor, wire_op).wait()
            return tensor.div_(self.wire.size) if op == "mean" else tensor
        return tensor.copy_(self._start_all_reduce(tensor, op, "all_reduce_").wait())

    def reduce_scatter(self, tensors: Sequence[Tensor], op: ReduceOp = "sum") -> Tensor:
        """Reduce the ranks' lists of tensors element by element; rank i gets the i-th result.

        Args:
            tensors: As many as there are ranks; the i-th has the same shape and dtype on every rank.
            op: As for `all_reduce`.

        Returns:
            A new tensor of the shape of ``tensors[rank]``.
        """
        wire, tensors = self.wire, self._one_dtype("reduce_scatter", tensors)
        mine = tensors[wire.rank]
        if any(t.shape != mine.shape for t in tensors):  # no engine does ragged ones: reduce all, keep one
            flat = self._start_all_reduce(
                torch.cat([t.detach().reshape(-1) for t in tensors]), op, "reduce_scatter"
            ).wait()
            parts = flat.split([t.numel() for t in tensors])
            return cast(Tensor, parts[wire.rank]).reshape(mine.shape).clone()
        stacked = torch.stack([t.detach() for t in tensors])
        wire_op = self._wire_op("reduce_scatter", stacked, op)
        self._agree("reduce_scatter", op, stacked)
        whole = self._encode(stacked)
        if whole.numel() == 0:
            return mine.detach().clone()
        part = torch.empty_like(whole[0])
        with self._guard("reduce_scatter", stacked, op):
            extremes.reduce_scatter_into(wire.at_once, part, whole, wire_op).wait()
        return self._decode(part, mine, op)

    # -- moving -------------------------------------------------------------------------------------------------------

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Collect every rank's tensor on every rank.

        Args:
            tensor: Any shape, which may differ between ranks; the dtype may not.

        Returns:
            New tensors, one a rank, in rank order. If ``tensor`` requires grad they can be differentiated: the
            gradient is the sum over the ranks, as in torch.

        Raises:
            CollectiveError: The dtypes differ, or the engine failed or timed out.
        """
        if differentiated(tensor):
            return list(cast("tuple[Tensor, ...]", _AllGather.apply(tensor, self)))
        wire = self.wire
        headers = self._exchange_headers("all_gather", tensor)
        sizes = [numel(shape) for _, shape in headers]
        longest = max(sizes)
        if longest == 0:
            return [torch.empty(shape, dtype=tensor.dtype, device=tensor.device) for _, shape in headers]
        flat = torch.zeros(longest, dtype=tensor.dtype, device=wire.device)
        flat[: tensor.numel()] = tensor.detach().reshape(-1).to(wire.device)
        sent = flat.view(torch.uint8)
        out = torch.empty((wire.size, sent.numel()), dtype=torch.uint8, device=wire.device)
        with self._guard("all_gather", tensor):
            wire.at_once.all_gather_into(out, sent).wait()
        received = out.view(tensor.dtype).to(tensor.device)
        return [received[i, :size].clone().reshape(headers[i][1]) for i, size in enumerate(sizes)]

    def all_to_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Send the i-th tensor to rank i.

        Args:
            tensors: As many as there are ranks, of one dtype (the same on every rank); shapes are free.

        Returns:
            New tensors: the i-th is the one that rank i sent to this rank.
        """
        wire, tensors = self.wire, self._one_dtype("all_to_all", tensors)
        self._agree("all_to_all", "", None)
        mine = torch.stack([header(t) for t in tensors]).to(wire.device)
        theirs = torch.empty_like(mine)
        counts = [mine.shape[1]] * wire.size
        with self._guard("all_to_all", mine):
            wire.all_to_all_into(theirs.view(-1), mine.view(-1), counts, counts).wait()
        headers = [read_header(row) for row in theirs.tolist()]
        first = tensors[0]
        # Every rank must take the same decision, or the ranks that raise leave the others waiting.
        wrong = [i for i, (dtype, _) in enumerate(headers) if dtype != first.dtype]
        if bool(self._start_all_reduce(torch.tensor(bool(wrong), device="cpu"), "max", "all_to_all").wait()):
            raise CollectiveError(
                f"all_to_all: the ranks sent different dtypes (this rank {first.dtype}; differing ranks {wrong})"
            )
        width = first.element_size()
        send = [t.numel() * width for t in tensors]
        receive = [numel(shape) * width for _, shape in headers]
        sent = torch.cat([t.detach().reshape(-1).to(wire.device) for t in tensors]).view(torch.uint8)
        out = torch.empty(sum(receive), dtype=torch.uint8, device=wire.device)
        with self._guard("all_to_all", sent):
            wire.all_to_all_into(out, sent, receive, send).wait()
        parts = out.split(receive)
        return [part.clone().view(first.dtype).reshape(headers[i][1]).to(first.device) for i, part in enumerate(parts)]

    @overload
    def broadcast(self, tensor: Tensor, src: int = 0, *, async_op: Literal[False] = False) -> Tensor: ...
    @overload
    def broadcast(self, tensor: Tensor, src: int = 0, *, async_op: Literal[True]) -> Pending[Tensor]: ...
    def broadcast(self, tensor: Tensor, src: int = 0, *, async_op: bool = False) -> Tensor | Pending[Tensor]:
        """Give every rank a copy of rank ``src``'s tensor.

        Args:
            tensor: On every rank the same shape and dtype; only ``src``'s content counts.
            src: A rank of this group.
            async_op: Return a `Pending` at once.

        Returns:
            A new tensor. It cannot be differentiated: pass a detached one.
        """
        refuse_gradient("broadcast", tensor)
        pending = self._start_broadcast(tensor, src, "broadcast", at_once=not async_op)
        return pending if async_op else pending.wait()

    def broadcast_(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Overwrite ``tensor`` with rank ``src``'s, and return it."""
        check_tensor("broadcast_", tensor)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise CollectiveError("broadcast_ would overwrite a tensor that requires grad; do so under torch.no_grad()")
        return tensor.copy_(self._start_broadcast(tensor, src, "broadcast_").wait())

    def barrier(self) -> None:
        """Return once every rank has called it."""
        self._agree("barrier", "", None)
        with self._guard("barrier", None):
            self.wire.at_once.barrier().wait()

    # -- objects ------------------------------------------------------------------------------------------------------

    def broadcast_object(self, obj: T, src: int = 0) -> T:
        """Give every rank a copy of rank ``src``'s object (pickled; the argument of other ranks is ignored).

        The source's own object is returned to it unchanged.
        """
        self._check_rank("broadcast_object", src)
        wire = self.wire
        data = pickled(obj, self._key) if wire.rank == src else None
        length = torch.tensor(0 if data is None else data.numel(), dtype=torch.int64, device="cpu")
        length = self._start_broadcast(length, src, "broadcast_object").wait()
        buffer = data if data is not None else torch.empty(int(length), dtype=torch.uint8, device="cpu")
        received = self._start_broadcast(buffer, src, "broadcast_object").wait()
        return obj if wire.rank == src else cast(T, unpickled(received, self._key))

    def all_gather_object(self, obj: T) -> list[T]:
        """Collect every rank's object (pickled) on every rank, in rank order."""
        gathered = self.all_gather(pickled(obj, self._key))
        return [obj if i == self.wire.rank else cast(T, unpickled(data, self._key)) for i, data in enumerate(gathered)]


class _AllReduce(torch.autograd.Function):
    """y = sum (or mean) over ranks of x; so dL/dx = sum (or mean) over ranks of dL/dy."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, communicator: Communicator, op: ReduceOp, name: str) -> Tensor:
        ctx.communicator, ctx.op = communicator, op
        return communicator._start_all_reduce(tensor, op, name).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return _AllReduce.apply(grads[0], ctx.communicator, ctx.op, "all_reduce backward"), None, None, None


class _AllGather(torch.autograd.Function):
    """y[i] = x of rank i; so dL/dx on rank i = sum over ranks of dL/dy[i]."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, communicator: Communicator) -> tuple[Tensor, ...]:
        ctx.communicator = communicator
        return tuple(communicator.all_gather(tensor.detach()))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _ReduceScatter.apply(ctx.communicator, *grads), None


class _ReduceScatter(torch.autograd.Function):
    """y = sum over ranks of their x[i] on rank i; so dL/dx[i] = dL/dy of rank i."""

    @staticmethod
    def forward(ctx: Any, communicator: Communicator, *tensors: Tensor) -> Tensor:
        ctx.communicator = communicator
        return communicator.reduce_scatter([tensor.detach() for tensor in tensors], "sum")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return None, *_AllGather.apply(grads[0], ctx.communicator)
