"""How agreed operations are carried out on an engine's communicator, one batch at a time.

Small all-reduces of one kind travel together in one buffer; large ones as they lie. A rank that has joined is given requests
without tensors, for which it contributes what changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvdtrain.backends import extremes
from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.forms import WIRE_DTYPE, numel
from hvdtrain.backends.layout import bytes_of
from hvdtrain.backends.wire import Done, WireOp, Work
from hvdtrain.horovod.adasum import adasum
from hvdtrain.horovod.halves import FROM_BYTES, HALVES, HalfSum
from hvdtrain.horovod.reductions import Adasum, Average, Max, Min, Product, Sum
from hvdtrain.horovod.requests import REDUCING, Form, Request, dtype_of
from hvdtrain.horovod.scaling import added, scale_, scaled, summed_in

_TOGETHER_BYTES = 2**18  # tensors up to this size share a buffer
_BUFFER_BYTES = 2**23

_WIRE_OP: dict[int, WireOp] = {Min: "min", Max: "max", Product: "product"}
_BOOL_OP: dict[WireOp, WireOp] = {"sum": "max", "max": "max", "min": "min", "product": "min"}


@dataclass(slots=True, eq=False)
class _Part:
    """One tensor of an all-reduce on its way."""

    form: Form
    tensor: Tensor | None  # None: this rank has joined
    out: Tensor | None
    like: tuple[torch.dtype, tuple[int, ...]]
    buffer: Tensor

    @property
    def op(self) -> int:
        return int(self.form.detail("op"))


@dataclass(slots=True, eq=False)
class _Sent:
    work: Work
    parts: list[_Part]
    flat: Tensor | None = None  # where the parts travel together


@dataclass(slots=True, eq=False)
class Agreed:
    """An operation that all ranks perform next: this rank's request, or none where it has joined."""

    form: Form
    request: Request | None
    parts: list[_Part] = field(default_factory=list)


def perform(communicator: Communicator, batch: Sequence[Agreed]) -> None:
    """Carry out a batch, in its order; the requests are ended.

    Raises what the engine raises; requests that are not over by then have to be ended by the caller.
    """
    at = 0
    while at < len(batch):
        end = at
        while end < len(batch) and batch[end].form.kind in REDUCING and batch[end].form.detail("op") != Adasum:
            end += 1
        if end > at:
            _reduce(communicator, batch[at:end])
            at = end
        else:
            agreed = batch[at]
            if agreed.request is not None:
                agreed.request.finish(_SINGLY[agreed.form.kind](communicator, agreed.request))
            at += 1


# -- all-reduce -----------------------------------------------------------------------------------------------------------


def _reduce(communicator: Communicator, batch: Sequence[Agreed]) -> None:
    for agreed in batch:
        agreed.parts = _parts(communicator, agreed)
    parts = [part for agreed in batch for part in agreed.parts if part.buffer.numel()]
    halves = [(part, HalfSum(communicator.wire, part.buffer)) for part in parts if part.buffer.dtype in HALVES]
    _reduce_wide(communicator, [part for part in parts if part.buffer.dtype not in HALVES])
    for part, half in halves:
        half.spread(lambda total, part=part: _scale(communicator, part, total))  # type: ignore[misc]
    for _, half in halves:
        half.finish()
    for agreed in batch:
        if agreed.request is not None:
            agreed.request.finish(_results(communicator, agreed))


class Sending:
    """One all-reduce under way on a communicator whose ranks start the same ones in the same order.

    When all of them have been started, `spread` of each must follow, and then `finish` of each, in that order.

    Args:
        communicator: Of the ranks, on the CPU.
        form: The same on every rank.
        request: This rank's, with one tensor; None for a rank that has joined.
    """

    def __init__(self, communicator: Communicator, form: Form, request: Request | None) -> None:
        self._communicator, self.request = communicator, request
        self._agreed = Agreed(form, request)
        self._agreed.parts = _parts(communicator, self._agreed)
        (self._part,) = self._agreed.parts
        self._half: HalfSum | None = None
        self._work: Work = Done()
        if self._part.buffer.dtype in HALVES and self._part.buffer.numel():
            self._half = HalfSum(communicator.wire, self._part.buffer)
        elif self._part.buffer.numel():
            self._work = extremes.all_reduce_(communicator.wire, self._part.buffer, _wire_op(self._part))

    def spread(self) -> None:
        """Start the second exchange, where there are two."""
        if self._half is not None:
            self._half.spread(lambda total: _scale(self._communicator, self._part, total))

    def finish(self) -> None:
        """Wait, and end the request."""
        if self._half is not None:
            self._half.finish()
        self._work.wait()
        if self.request is not None:
            self.request.finish(_results(self._communicator, self._agreed))


def _reduce_wide(communicator: Communicator, parts: Sequence[_Part]) -> None:
    """Reduce what an engine reduces itself, small ones of a kind in one buffer."""
    if len(parts) == 1:  # nothing else to start meanwhile
        extremes.all_reduce_(communicator.wire.at_once, parts[0].buffer, _wire_op(parts[0])).wait()
        return
    sent: list[_Sent] = []
    open_buffers: dict[tuple[WireOp, torch.dtype], list[_Part]] = {}
    for part in parts:
        size = part.buffer.nbytes
        if size > _TOGETHER_BYTES:
            sent.append(_Sent(extremes.all_reduce_(communicator.wire, part.buffer, _wire_op(part)), [part]))
            continue
        kind = (_wire_op(part), part.buffer.dtype)
        waiting = open_buffers.setdefault(kind, [])
        if sum(other.buffer.nbytes for other in waiting) + size > _BUFFER_BYTES:
            sent.append(_send_together(communicator, waiting))
            waiting.clear()
        waiting.append(part)
    sent += [_send_together(communicator, waiting) for waiting in open_buffers.values() if waiting]
    for one in sent:
        one.work.wait()
        if one.flat is not None:
            received = one.flat.split([part.buffer.numel() for part in one.parts])
            for part, values in zip(one.parts, received, strict=True):
                part.buffer = values.view(part.buffer.shape)


def ready_to_reduce(communicator: Communicator, request: Request) -> Tensor:
    """A copy of a request's only tensor on the CPU, as it is reduced."""
    tensor = scaled(request.tensors[0].detach(), request.form.detail("prescale"))
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return plain.to("cpu", summed_in(tensor.dtype, request.form.detail("op"))).contiguous()


def outcome_of(communicator: Communicator, request: Request, total: Tensor) -> Any:
    """What the caller gets, of what the ranks' only tensors come to."""
    ((name, shape),) = request.form.tensors
    out = request.outputs[0] if request.outputs else None
    part = _Part(request.form, request.tensors[0].detach(), out, (dtype_of(name), shape), total)
    return _results(communicator, Agreed(request.form, request, [part]))


def _send_together(communicator: Communicator, parts: list[_Part]) -> _Sent:
    parts = list(parts)
    op = _wire_op(parts[0])
    if len(parts) == 1:
        return _Sent(extremes.all_reduce_(communicator.wire, parts[0].buffer, op), parts)
    flat = torch.cat([part.buffer.reshape(-1) for part in parts])
    return _Sent(extremes.all_reduce_(communicator.wire, flat, op), parts, flat)


def _parts(communicator: Communicator, agreed: Agreed) -> list[_Part]:
    request, form, parts = agreed.request, agreed.form, []
    for at, (name, shape) in enumerate(form.tensors):
        dtype = dtype_of(name)
        wanted = _carried(communicator, form, dtype, shape)
        if request is None:
            tensor = out = None
            buffer = _nothing(communicator, form, dtype, shape, wanted)
        else:
            tensor = request.tensors[at].detach()
            out = request.outputs[at] if request.outputs else None
            buffer = _buffer(communicator, scaled(tensor, form.detail("prescale")), out, wanted)
        parts.append(_Part(form, tensor, out, (dtype, shape), buffer))
    return parts


def _carried(communicator: Communicator, form: Form, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.dtype:
    """The dtype in which a tensor travels; every rank comes to the same."""
    if dtype in HALVES and form.detail("op") in (Average, Sum) and communicator.wire.size > 1:
        return dtype if numel(shape) * dtype.itemsize >= FROM_BYTES else WIRE_DTYPE[dtype]
    return summed_in(dtype, form.detail("op"))


def _buffer(communicator: Communicator, tensor: Tensor, out: Tensor | None, wanted: torch.dtype) -> Tensor:
    """What is reduced in place: the user's own memory where it may be, else a copy as the engine wants it."""
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    device = communicator.wire.device
    if (
        out is not None
        and plain.dtype == wanted
        and out.dtype == wanted
        and out.device == device
        and out.is_contiguous()
    ):
        if out.data_ptr() != plain.data_ptr():
            out.copy_(plain)
        return out.detach()
    copy = plain.to(device, wanted, copy=True, memory_format=torch.contiguous_format)
    return copy.contiguous()


def _nothing(
    communicator: Communicator, form: Form, dtype: torch.dtype, shape: tuple[int, ...], wire: torch.dtype
) -> Tensor:
    """What a rank that has joined contributes, of dtype ``wire``."""
    op = form.detail("op")
    least: float = -torch.inf if wire.is_floating_point else torch.iinfo(wire).min
    most: float = torch.inf if wire.is_floating_point else torch.iinfo(wire).max
    if dtype == torch.bool:
        least, most = 0, 1
    value = {Min: most, Max: least, Product: 1}.get(op, 0)
    whole = (*shape, 2) if dtype.is_complex else shape
    return torch.full(whole, value, dtype=wire, device=communicator.wire.device)


def _wire_op(part: _Part) -> WireOp:
    op: WireOp = _WIRE_OP.get(part.op, "sum")
    return _BOOL_OP[op] if part.like[0] == torch.bool else op


def _results(communicator: Communicator, agreed: Agreed) -> Any:
    results = []
    for part in agreed.parts:
        assert part.tensor is not None
        dtype, shape = part.like
        if part.buffer.dtype not in HALVES:  # which were scaled before they were rounded
            _scale(communicator, part, part.buffer)
        value = torch.view_as_complex(part.buffer) if dtype.is_complex else part.buffer
        if part.out is None:
            part.out = value.to(part.tensor.device, dtype).reshape(shape)
        elif part.out.data_ptr() != value.data_ptr() or part.out.dtype != value.dtype:
            part.out.copy_(value.reshape(shape))
        results.append(part.out)
    return results[0] if agreed.form.kind == "allreduce" else tuple(results)


def _scale(communicator: Communicator, part: _Part, total: Tensor) -> None:
    """Make of a sum what was asked for, in place."""
    divisor = communicator.wire.size if part.op == Average else 1
    scale_(total, part.like[0], part.form.detail("postscale"), divisor)


# -- the others -----------------------------------------------------------------------------------------------------------


def _adasum(communicator: Communicator, request: Request) -> Any:
    results = []
    for at, tensor in enumerate(request.tensors):
        before = scaled(tensor.detach(), request.form.detail("prescale"))
        value = scaled(adasum(communicator, before), request.form.detail("postscale"))
        results.append(request.outputs[at].copy_(value) if request.outputs else value)
    return results[0] if request.form.kind == "allreduce" else tuple(results)


def _all_gather(communicator: Communicator, request: Request) -> Any:
    gathered = [torch.cat(communicator.all_gather(tensor.detach())) for tensor in request.tensors]
    return gathered[0] if request.form.kind == "allgather" else tuple(gathered)


def _broadcast(communicator: Communicator, request: Request) -> Tensor:
    (tensor,) = request.tensors
    src = communicator.ranks.index(request.form.detail("root_rank"))
    out = request.outputs[0] if request.outputs else torch.empty_like(tensor, memory_format=torch.contiguous_format)
    out = out.detach()
    if communicator.wire.rank == src and out.data_ptr() != tensor.data_ptr():
        out.copy_(tensor.detach())
    if out.numel():
        direct = out.is_contiguous() and out.device == communicator.wire.device and not out.is_complex()
        carried = out if direct else out.to(communicator.wire.device, copy=True, memory_format=torch.contiguous_format)
        carried = carried.resolve_conj().contiguous()
        communicator.wire.at_once.broadcast_(bytes_of(carried), src).wait()
        if not direct:
            out.copy_(carried)
    return request.outputs[0] if request.outputs else out


def _broadcast_object(communicator: Communicator, request: Request) -> Tensor:
    src = communicator.ranks.index(request.form.detail("root_rank"))
    mine = request.tensors[0] if communicator.wire.rank == src else torch.empty(0, dtype=torch.uint8, device="cpu")
    length = communicator.broadcast(torch.tensor(mine.numel(), dtype=torch.int64, device="cpu"), src)
    return communicator.broadcast(mine if communicator.wire.rank == src else mine.new_empty(int(length)), src)


def _all_gather_object(communicator: Communicator, request: Request) -> list[Tensor]:
    return communicator.all_gather(request.tensors[0])


def _all_to_all(communicator: Communicator, request: Request) -> tuple[Tensor, list[int]]:
    (tensor,) = request.tensors
    named = tensor.detach()[: sum(request.splits)].contiguous()
    received = communicator.all_to_all(list(named.split(request.splits)))
    return torch.cat(received), [part.shape[0] for part in received]


def _reduce_scatter(communicator: Communicator, request: Request) -> Any:
    form, results = request.form, []
    average = form.detail("op") == Average
    for tensor in request.tensors:
        before = scaled(tensor.detach(), form.detail("prescale"))
        rows = shares(tensor.shape[0], communicator.wire.size)
        if tensor.dtype in HALVES and communicator.wire.size > 1:  # travel as they are, and are added up in float32
            mine = added([part.float() for part in communicator.all_to_all(list(before.contiguous().split(rows)))])
        else:
            wide = before.to(summed_in(tensor.dtype, form.detail("op"))) if not tensor.is_complex() else before
            mine = communicator.reduce_scatter(list(wide.split(rows)), "sum")
        scale_(mine, tensor.dtype, form.detail("postscale"), communicator.wire.size if average else 1)
        results.append(mine.to(tensor.dtype))
    return results[0] if form.kind == "reducescatter" else tuple(results)


def shares(rows: int, size: int) -> list[int]:
    """How reducescatter divides rows among ranks: the first ones get one more."""
    return [rows // size + (rank < rows % size) for rank in range(size)]


def _act(communicator: Communicator, request: Request) -> Any:
    return request.act() if request.act is not None else None


_SINGLY: dict[str, Callable[[Communicator, Request], Any]] = {
    "allreduce": _adasum,
    "grouped_allreduce": _adasum,
    "allgather": _all_gather,
    "grouped_allgather": _all_gather,
    "broadcast": _broadcast,
    "broadcast_object": _broadcast_object,
    "allgather_object": _all_gather_object,
    "alltoall": _all_to_all,
    "reducescatter": _reduce_scatter,
    "grouped_reducescatter": _reduce_scatter,
    "barrier": _act,
    "agreement": _act,
    "gradients": _act,
}
