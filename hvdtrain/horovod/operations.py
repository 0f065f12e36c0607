"""Horovod's operations on tensors, started and waited for: what has ``_async`` in its name returns a handle.

The differentiable forms, which wait, are in `gradients`. Arguments are those of Horovod 0.28.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvdtrain.backends.forms import check_tensor
from hvdtrain.errors import CollectiveError, HorovodInternalError
from hvdtrain.horovod import state
from hvdtrain.horovod.handles import begin, synchronize
from hvdtrain.horovod.passing_through import by_engine
from hvdtrain.horovod.process_sets import ProcessSet, global_process_set
from hvdtrain.horovod.reductions import NAMES, Adasum, Average, Sum, chosen, valid
from hvdtrain.horovod.requests import Request, form, form_and_text
from hvdtrain.horovod.state import real


def _same(result: Any) -> Any:
    return result


def start(
    kind: str,
    tensors: Sequence[Tensor],
    name: str | None,
    process_set: ProcessSet,
    *,
    outputs: Sequence[Tensor] = (),
    splits: Sequence[int] = (),
    finish: Callable[[Any], Any] = _same,
    waited_for: bool = False,
    alike: bool = True,
    **details: Any,
) -> int:
    """Ask for an operation and return its handle; ``alike`` False where the ranks' tensors may differ altogether."""
    _check_carried(kind, tensors)
    _check_written(kind, outputs)
    if any(tensor.is_inference() for tensor in (*tensors, *outputs)):
        tensors, outputs, finish = _out_of_inference(tensors, outputs, finish)
    controller = state.controller_of(process_set, f"hvd.{kind}")
    compared = tensors if alike else []
    asked, text = form_and_text(kind, name, compared, **details)
    request = Request(asked, list(tensors), list(outputs), list(splits), text=text)
    if name is None:
        request.number = state.next_number(process_set, kind)
    return begin(controller, request, finish, waited_for=waited_for)


def _out_of_inference(
    tensors: Sequence[Tensor], outputs: Sequence[Tensor], finish: Callable[[Any], Any]
) -> tuple[list[Tensor], list[Tensor], Callable[[Any], Any]]:
    """Stand-ins for tensors of `torch.inference_mode`, which no other thread may write: the caller's get the result when it waits."""
    with torch.inference_mode(False), torch.no_grad():
        stands = {id(tensor): tensor.clone() for tensor in (*tensors, *outputs) if tensor.is_inference()}

    def written(result: Any) -> Any:
        if not outputs:
            return finish(result)
        with torch.inference_mode():
            own = [out.copy_(stands[id(out)]) if id(out) in stands else out for out in outputs]
        return finish(tuple(own) if isinstance(result, tuple) else own[0])

    return (
        [stands.get(id(tensor), tensor) for tensor in tensors],
        [stands.get(id(tensor), tensor) for tensor in outputs],
        written,
    )


def _check_carried(kind: str, tensors: Sequence[Tensor]) -> None:
    """Refuse, on this rank alone, what would fail on all of them later."""
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"hvd.{kind} takes tensors, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise ValueError(f"hvd.{kind} takes dense tensors, got {tensor.layout}; see hvd.sparse_allreduce_async")
        if tensor.is_meta:
            raise ValueError(f"hvd.{kind} takes tensors with numbers in them, got one on the meta device")
        if kind != "broadcast" or tensor.is_quantized:  # which moves bytes of any kind
            try:
                check_tensor(f"hvd.{kind}", tensor)
            except CollectiveError as error:
                raise ValueError(str(error)) from None


def _check_written(kind: str, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(
                f"hvd.{kind} in place needs a place for each element, and some of this tensor's share one; use tensor.clone()"
            )


# -- allreduce ----------------------------------------------------------------------------------------------------------------


def reduce_async(
    tensors: Sequence[Tensor],
    outputs: Sequence[Tensor] | None,
    name: str | None,
    op: int,
    prescale_factor: float,
    postscale_factor: float,
    process_set: ProcessSet,
    *,
    grouped: bool,
    waited_for: bool = False,
) -> int:
    """Start to reduce tensors; ``outputs`` None for new ones."""
    kind = "grouped_allreduce" if grouped else "allreduce"
    valid(op)
    _check_carried(kind, tensors)  # before what it is to be reduced by
    for tensor in tensors:
        _check_reduction(kind, tensor, op)
    if op == Adasum:
        _check_adasum(process_set)
    if outputs is None:
        outputs = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format, requires_grad=False) for tensor in tensors
        ]
    return start(
        kind, tensors, name, process_set, outputs=outputs, waited_for=waited_for,
        op=op, prescale=float(prescale_factor), postscale=float(postscale_factor),
    )  # fmt: skip


def _check_reduction(kind: str, tensor: Tensor, op: int) -> None:
    if tensor.dtype == torch.bool and op in (Average, Adasum):
        raise ValueError(f"hvd.{kind}: hvd.{NAMES[op]} of bool is undefined; convert it: tensor.float()")
    if tensor.is_complex() and op not in (Average, Sum):
        raise ValueError(f"hvd.{kind}: hvd.{NAMES[op]} of complex numbers is undefined")
    if op == Adasum and not tensor.is_floating_point():
        raise ValueError(f"hvd.{kind}: hvd.Adasum is defined for floating-point tensors, got {tensor.dtype}")


def _check_adasum(process_set: ProcessSet) -> None:
    if process_set is not global_process_set:
        raise NotImplementedError("hvd.Adasum works over all ranks, not over a process set")
    ranks = state.size()
    if ranks & (ranks - 1):
        raise NotImplementedError(f"hvd.Adasum needs a power of two ranks, and there are {ranks}")


@by_engine(real)
def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start to reduce a tensor over the ranks into a new one; `allreduce` waits for it."""
    op = chosen(op, average)
    return reduce_async([tensor], None, name, op, prescale_factor, postscale_factor, process_set, grouped=False)


@by_engine(real)
def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start to reduce a tensor over the ranks, in place."""
    op = chosen(op, average)
    return reduce_async([tensor], [tensor], name, op, prescale_factor, postscale_factor, process_set, grouped=False)


@by_engine(real)
def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Reduce a tensor over the ranks, in place, and return it."""
    op = chosen(op, average)
    handle = reduce_async(
        [tensor], [tensor], name, op, prescale_factor, postscale_factor, process_set, grouped=False, waited_for=True
    )
    result: Tensor = synchronize(handle)
    return result


@by_engine(real)
def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start to reduce several tensors as one operation, into new ones."""
    op = chosen(op, average)
    return reduce_async(tensors, None, name, op, prescale_factor, postscale_factor, process_set, grouped=True)


@by_engine(real)
def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start to reduce several tensors as one operation, in place."""
    op = chosen(op, average)
    return reduce_async(tensors, tensors, name, op, prescale_factor, postscale_factor, process_set, grouped=True)


@by_engine(real)
def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Reduce several tensors as one operation, in place, and return them."""
    return synchronize(
        grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set)
    )


@by_engine(real)
def sparse_allreduce_async(
    tensor: Tensor, name: str | None, op: int, process_set: ProcessSet = global_process_set
) -> Callable[[], Tensor]:
    """Start to add up (or average) sparse tensors; the result is callable, waits and returns the sum."""
    held = tensor.detach().coalesce()
    indices, values = (None, None) if name is None else (f"{name}.indices", f"{name}.values")
    first = allgather_async(held.indices().t().contiguous(), indices, process_set)
    second = allgather_async(held.values(), values, process_set)

    def wait() -> Tensor:
        all_indices, all_values = synchronize(first), synchronize(second)
        if op == Average:
            all_values = all_values / (process_set.size() or 1)
        return torch.sparse_coo_tensor(all_indices.t(), all_values, held.shape, check_invariants=False)

    return wait


# -- moving -------------------------------------------------------------------------------------------------------------------


def _check_rows(kind: str, tensors: Sequence[Tensor]) -> None:
    _check_carried(kind, tensors)
    for tensor in tensors:
        if tensor.dim() == 0:
            raise HorovodInternalError(
                f"hvd.{kind} needs tensors with a first dimension, got a scalar; use tensor.reshape(1)"
            )


@by_engine(real)
def allgather_async(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> int:
    """Start to concatenate the ranks' tensors along the first dimension, which may differ between ranks."""
    _check_rows("allgather", [tensor])
    return start("allgather", [tensor], name, process_set)


@by_engine(real)
def grouped_allgather_async(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Start `allgather_async` of several tensors as one operation."""
    _check_rows("grouped_allgather", tensors)
    return start("grouped_allgather", tensors, name, process_set)


def check_root(root_rank: int, process_set: ProcessSet, kind: str = "broadcast") -> int:
    """Refuse a root that is none of the ranks."""
    state.job()
    if root_rank not in (process_set.ranks or []):
        raise ValueError(f"hvd.{kind}: root_rank={root_rank!r} is none of the ranks {process_set.ranks}")
    return int(root_rank)


@by_engine(real)
def broadcast_async(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Start to give every rank a copy of the root's tensor. ``root_rank`` is a rank of the world."""
    return start("broadcast", [tensor], name, process_set, root_rank=check_root(root_rank, process_set))


@by_engine(real)
def broadcast_async_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> int:
    """Start to overwrite every rank's tensor with the root's."""
    root_rank = check_root(root_rank, process_set)
    return start("broadcast", [tensor], name, process_set, outputs=[tensor], root_rank=root_rank)


@by_engine(real)
def broadcast_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """Overwrite every rank's tensor with the root's, and return it."""
    result: Tensor = synchronize(broadcast_async_(tensor, root_rank, name, process_set))
    return result


@by_engine(real)
def alltoall_async(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> int:
    """Start to send rows of a tensor to each rank: ``splits[i]`` to rank i, or equal parts.

    Its result is a pair: the received rows, and how many came from each rank.

    Raises:
        ValueError: The splits are no whole numbers, or do not fit the tensor.
    """
    _check_rows("alltoall", [tensor])
    controller_size = process_set.size() or 1
    state.controller_of(process_set, "hvd.alltoall")
    rows = tensor.shape[0]
    parts = _splits(splits, rows, controller_size)
    like = splits if isinstance(splits, Tensor) else torch.empty(0, dtype=torch.int32, device="cpu")

    def finish(result: tuple[Tensor, list[int]]) -> tuple[Tensor, Tensor]:
        received, counts = result
        return received, torch.tensor(counts, dtype=like.dtype, device=like.device)

    return start("alltoall", [tensor], name, process_set, splits=parts, finish=finish)


def _splits(splits: Tensor | Sequence[int] | None, rows: int, size: int) -> list[int]:
    if splits is None or len(splits) == 0:
        if rows % size:
            raise ValueError(
                f"hvd.alltoall: {rows} rows do not divide among {size} ranks; give splits=, how many go to each"
            )
        return [rows // size] * size
    if isinstance(splits, Tensor):
        if splits.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"hvd.alltoall: splits are numbers of rows, of dtype int32 or int64, got {splits.dtype}")
        splits = splits.tolist()
    parts = list(splits)
    if len(parts) != size or any(not isinstance(part, int) or part < 0 for part in parts):
        raise ValueError(f"hvd.alltoall: splits are {size} numbers of rows, one a rank, got {parts}")
    if sum(parts) > rows:
        raise ValueError(f"hvd.alltoall: the splits {parts} come to {sum(parts)} rows, and the tensor has {rows}")
    return parts


@by_engine(real)
def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Start to reduce a tensor over the ranks, of which each keeps some rows; the first ranks one more if need be."""
    return _scatter("reducescatter", [tensor], name, op, process_set, prescale_factor, postscale_factor)


@by_engine(real)
def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> int:
    """Start `reducescatter_async` of several tensors as one operation."""
    return _scatter("grouped_reducescatter", tensors, name, op, process_set, prescale_factor, postscale_factor)


def _scatter(
    kind: str,
    tensors: Sequence[Tensor],
    name: str | None,
    op: int,
    process_set: ProcessSet,
    prescale_factor: float,
    postscale_factor: float,
) -> int:
    if valid(op) not in (Average, Sum):
        raise HorovodInternalError(f"hvd.{kind} adds (hvd.Sum) or averages (hvd.Average), got hvd.{NAMES[op]}")
    _check_rows(kind, tensors)
    for tensor in tensors:
        _check_reduction(kind, tensor, op)
    return start(
        kind, tensors, name, process_set, op=op, prescale=float(prescale_factor), postscale=float(postscale_factor)
    )


# -- without tensors ----------------------------------------------------------------------------------------------------------


@by_engine(real)
def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Return once every rank of the process set has called it."""
    synchronize(start("barrier", [], None, process_set, waited_for=True))


@by_engine(real)
def join(device: int = -1) -> int:
    """Say that this rank has no more data: it takes part in the others' allreduces with nothing, until all have joined.

    Args:
        device: Accepted for Horovod's sake; what a joined rank contributes lies where the engine needs it.

    Returns:
        The rank that joined last.
    """
    last = state.join(Request(form("join", None, [])))
    state.count_anew()
    return last
