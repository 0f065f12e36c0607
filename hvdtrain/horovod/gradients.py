"""The operations that wait for their result, which autograd can follow, with Horovod's own gradients.

Where Horovod's gradient is an average (allgather, broadcast) it is one here, though torch's would be a sum. Gradients are made of
these operations themselves, so that they can be differentiated again, as a penalty on them does; every rank must then do so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvdtrain.horovod.compression import Compression
from hvdtrain.horovod.handles import synchronize
from hvdtrain.horovod.operations import (
    allgather_async,
    alltoall_async,
    broadcast_async,
    grouped_allgather_async,
    grouped_reducescatter_async,
    reduce_async,
    reducescatter_async,
)
from hvdtrain.horovod.passing_through import by_engine
from hvdtrain.horovod.process_sets import ProcessSet, global_process_set
from hvdtrain.horovod.reductions import Average, Sum, chosen
from hvdtrain.horovod.state import real

_Function: Any = torch.autograd.Function


class _Reduce(_Function):  # type: ignore[misc]
    """y = reduced over ranks of x; dL/dx = the same reduction of dL/dy."""

    @staticmethod
    def forward(ctx: Any, grouped: bool, name: str | None, how: tuple[Any, ...], *tensors: Tensor) -> Any:
        ctx.grouped, ctx.how = grouped, how
        return synchronize(reduce_async(tensors, None, name, *how, grouped=grouped, waited_for=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        result = _Reduce.apply(ctx.grouped, None, ctx.how, *grads)
        return (None, None, None, *(result if ctx.grouped else [result]))


@by_engine(real)
def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Reduce a tensor over the ranks.

    Args:
        tensor: The same shape and dtype on every rank; left alone.
        average: Older than ``op``: True for the average, False for the sum.
        name: By which the ranks' calls are matched; calls without one by their number.
        compression: See `Compression`.
        op: hvd.Average (if neither is given), Sum, Min, Max, Product or Adasum.
        prescale_factor: Multiplies each rank's tensor before.
        postscale_factor: Multiplies the result.
        process_set: The ranks that take part.

    Returns:
        A new tensor of the same shape and dtype. An average of integers is cut towards zero.

    Raises:
        ValueError: The arguments exclude each other, or `init` was not called.
        HorovodInternalError: The ranks do not say the same; the message tells who said what.
    """
    how = (chosen(op, average), prescale_factor, postscale_factor, process_set)
    small, context = compression.compress(tensor)
    if isinstance(small, Tensor) and not (
        small.requires_grad and torch.is_grad_enabled()
    ):  # nothing for autograd to record
        total = synchronize(reduce_async([small], None, name, *how, grouped=False, waited_for=True))
    else:
        total = _Reduce.apply(False, name, how, small)
    return compression.decompress(total, context)  # type: ignore[no-any-return]


@by_engine(real)
def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """`allreduce` of several tensors as one operation."""
    how = (chosen(op, average), prescale_factor, postscale_factor, process_set)
    pairs = [compression.compress(tensor) for tensor in tensors]
    reduced = _Reduce.apply(True, name, how, *(small for small, _ in pairs))
    return [compression.decompress(one, context) for one, (_, context) in zip(reduced, pairs, strict=True)]


class _Gather(_Function):  # type: ignore[misc]
    """y = all ranks' rows; dL/dx = this rank's rows of the average over ranks of dL/dy."""

    @staticmethod
    def forward(ctx: Any, grouped: bool, name: str | None, process_set: ProcessSet, *tensors: Tensor) -> Any:
        ctx.grouped, ctx.process_set = grouped, process_set
        ctx.rows = [tensor.shape[0] if tensor.dim() else 0 for tensor in tensors]
        if grouped:
            return synchronize(grouped_allgather_async(list(tensors), name, process_set))
        return synchronize(allgather_async(tensors[0], name, process_set))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        process_set = ctx.process_set
        means = _means(grads, process_set)
        counts = synchronize(allgather_async(torch.tensor([ctx.rows], device="cpu"), None, process_set))
        before = counts[: process_set.rank() or 0].sum(0).tolist()
        own = [mean.narrow(0, at, rows) for mean, at, rows in zip(means, before, ctx.rows, strict=True)]
        return (None, None, None, *own)


@by_engine(real)
def allgather(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """Concatenate the ranks' tensors along the first dimension, which may differ between ranks."""
    return _Gather.apply(False, name, process_set, tensor)  # type: ignore[no-any-return]


@by_engine(real)
def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> tuple[Tensor, ...]:
    """`allgather` of several tensors as one operation."""
    return tuple(_Gather.apply(True, name, process_set, *tensors))


class _Broadcast(_Function):  # type: ignore[misc]
    """y = x of the root; dL/dx = the average over ranks of dL/dy on the root, 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, root_rank: int, name: str | None, process_set: ProcessSet) -> Any:
        ctx.root_rank, ctx.process_set = root_rank, process_set
        return synchronize(broadcast_async(tensor, root_rank, name, process_set))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        process_set = ctx.process_set
        (mean,) = _means(grads, process_set)
        if process_set.ranks[process_set.rank()] != ctx.root_rank:
            mean = mean.masked_fill(mean.new_ones((), dtype=torch.bool), 0)  # zeros that depend on it, as on the root
        return mean, None, None, None


@by_engine(real)
def broadcast(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Give every rank a copy of the root's tensor.

    Args:
        tensor: The same shape and dtype on every rank; only the root's content counts.
        root_rank: A rank of the world, also in a process set.
        name: As for `allreduce`.
        process_set: The ranks that take part.
    """
    return _Broadcast.apply(tensor, root_rank, name, process_set)  # type: ignore[no-any-return]


class _ToAll(_Function):  # type: ignore[misc]
    """y = the rows that the ranks send here; dL/dx = the rows of dL/dy, sent back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, splits: Any, name: str | None, process_set: ProcessSet) -> Any:
        received, counts = synchronize(alltoall_async(tensor, splits, name, process_set))
        ctx.process_set, ctx.counts, ctx.rows = process_set, counts, tensor.shape[0]
        if splits is None:
            return received
        ctx.mark_non_differentiable(counts)
        return received, counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        back, _ = _ToAll.apply(grads[0], ctx.counts, None, ctx.process_set)
        kept_here = ctx.rows - back.shape[0]  # rows that no split named
        if kept_here:
            back = torch.cat([back, back.new_zeros(kept_here, *back.shape[1:])])
        return back, None, None, None


@by_engine(real)
def alltoall(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send rows of a tensor to each rank: ``splits[i]`` to rank i, or equal parts.

    Returns:
        The received rows; with ``splits`` also a tensor of how many came from each rank.
    """
    return _ToAll.apply(tensor, splits, name, process_set)


class _Scatter(_Function):  # type: ignore[misc]
    """y = this rank's rows of the sum (average) of x; dL/dx = all ranks' dL/dy, times the ranks for a sum."""

    @staticmethod
    def forward(ctx: Any, grouped: bool, name: str | None, how: tuple[Any, ...], *tensors: Tensor) -> Any:
        ctx.how = how
        if grouped:
            return synchronize(grouped_reducescatter_async(list(tensors), name, *how))
        return synchronize(reducescatter_async(tensors[0], name, *how))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        op, process_set, before, after = ctx.how
        factor = before * after * (process_set.size() if op == Sum else 1)
        gathered = _Gather.apply(True, None, process_set, *(grad * factor for grad in grads))
        return (None, None, None, *gathered)


@by_engine(real)
def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor:
    """Reduce a tensor over the ranks, of which each keeps some rows; the first ranks one more if need be.

    Args:
        tensor: The same shape and dtype on every rank, with a first dimension.
        name: As for `allreduce`.
        compression: See `Compression`.
        op: hvd.Average or hvd.Sum.
        process_set: The ranks that take part.
        prescale_factor: Multiplies each rank's tensor before.
        postscale_factor: Multiplies the result.
    """
    small, context = compression.compress(tensor)
    how = (op, process_set, prescale_factor, postscale_factor)
    return compression.decompress(_Scatter.apply(False, name, how, small), context)  # type: ignore[no-any-return]


@by_engine(real)
def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: Any = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    """`reducescatter` of several tensors as one operation."""
    pairs = [compression.compress(tensor) for tensor in tensors]
    how = (op, process_set, prescale_factor, postscale_factor)
    kept = _Scatter.apply(True, name, how, *(small for small, _ in pairs))
    return [compression.decompress(one, context) for one, (_, context) in zip(kept, pairs, strict=True)]


def _means(tensors: Sequence[Tensor], process_set: ProcessSet) -> Sequence[Tensor]:
    means: Sequence[Tensor] = _Reduce.apply(True, None, (Average, 1.0, 1.0, process_set), *tensors)
    return means
