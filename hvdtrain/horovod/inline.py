"""Small all-reduces whose numbers travel in the very message that asks for them: one exchange in all.

What lies where follows from the message alone, so that every rank knows what the others have put where. Every rank combines the
numbers itself, in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.forms import WIRE_DTYPE, numel
from hvdtrain.backends.layout import bytes_of
from hvdtrain.horovod.ledger import Key
from hvdtrain.horovod.performing import outcome_of, ready_to_reduce
from hvdtrain.horovod.reductions import Adasum, Average, Max, Min, Product, Sum
from hvdtrain.horovod.requests import Form, Request, dtype_of
from hvdtrain.horovod.scaling import added, summed_in

AREA_BYTES = 128
"""Of each message."""


class Places:
    """Where small numbers lie in a message's area."""

    def __init__(self) -> None:
        self._sizes: dict[int, tuple[Form, int]] = {}  # by identity of a form that all ranks know

    def of(self, asked: Sequence[tuple[Key, Form]]) -> dict[Key, int]:
        """The place of each request that has room, in the order of the message."""
        found: dict[Key, int] = {}
        at = 0
        for key, form in asked:
            size = self._size(form)
            if size and at + size <= AREA_BYTES:
                found[key] = at
                at += -(-size // 8) * 8  # numbers of 8 bytes lie at multiples of 8
        return found

    def _size(self, form: Form) -> int:
        known = self._sizes.get(id(form))
        if known is not None and known[0] is form:
            return known[1]
        size = 0
        if form.kind == "allreduce" and form.detail("op") != Adasum:
            ((name, shape),) = form.tensors
            dtype = dtype_of(name)
            size = numel(shape) * summed_in(dtype, form.detail("op")).itemsize * (2 if dtype.is_complex else 1)
        if len(self._sizes) > 2**14:
            self._sizes.clear()
        self._sizes[id(form)] = (form, size if size <= AREA_BYTES else 0)
        return self._sizes[id(form)][1]


class Alone:
    """The shortest way of a sum or an average that is the only thing that the ranks ask for: where its numbers lie, found once.

    Args:
        form: Of the request.
        out: This rank's message from its area on.
        heard: Every rank's, of shape (ranks, bytes).
    """

    def __init__(self, form: Form, out: Tensor, heard: Tensor) -> None:
        ((name, shape),) = form.tensors
        self.form, self.dtype = form, dtype_of(name)
        size = numel(shape) * self.dtype.itemsize
        self._mine = out[:size].view(self.dtype).view(shape)
        self._rows = [row[:size].view(self.dtype).view(shape) for row in heard]
        self._divisor = len(heard) if form.detail("op") == Average else 1

    @staticmethod
    def fits(form: Form) -> bool:
        """Whether an operation may go this way: nothing is done to its numbers but to add and divide them."""
        if form.kind != "allreduce" or form.detail("prescale") != 1 or form.detail("postscale") != 1:
            return False
        ((name, shape),) = form.tensors
        dtype, op = dtype_of(name), form.detail("op")
        if WIRE_DTYPE[dtype] != dtype or not 0 < numel(shape) * dtype.itemsize <= AREA_BYTES:
            return False
        return op == Sum or (op == Average and dtype.is_floating_point)

    def put(self, request: Request) -> None:
        """Write a request's numbers."""
        self._mine.copy_(request.tensors[0])

    def finish(self, request: Request) -> None:
        """End a request with what all ranks' numbers come to."""
        total = added(self._rows)
        if self._divisor != 1:
            total.div_(self._divisor)
        request.finish(request.outputs[0].copy_(total))


def put(area: Tensor, at: int, communicator: Communicator, request: Request) -> None:
    """Write a request's numbers."""
    numbers = bytes_of(ready_to_reduce(communicator, request))
    area[at : at + numbers.numel()] = numbers


def finish(communicator: Communicator, request: Request, areas: Sequence[Tensor], places: Sequence[int]) -> None:
    """End a request with what all ranks' numbers come to.

    Args:
        communicator: Of the group.
        request: This rank's.
        areas: Of each rank.
        places: Where the numbers are in each.
    """
    ((name, shape),) = request.form.tensors
    dtype, op = dtype_of(name), request.form.detail("op")
    wire = summed_in(dtype, op)
    whole = (*shape, 2) if dtype.is_complex else shape
    size = numel(whole) * wire.itemsize
    stacked = torch.cat([area[at : at + size] for area, at in zip(areas, places, strict=True)]).view(wire)
    stacked = stacked.view(len(areas), *whole)
    boolean = dtype == torch.bool
    if op == Min or (boolean and op == Product):
        total = stacked.amin(0)
    elif op == Max or boolean:
        total = stacked.amax(0)
    elif op == Product:
        total = stacked.prod(0, dtype=wire)
    else:
        total = added(stacked.unbind())
    request.finish(outcome_of(communicator, request, total))
