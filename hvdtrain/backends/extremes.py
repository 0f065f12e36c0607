"""The least and the greatest number of the ranks, the same on every engine, also where numbers are NaN.

An engine's own comparison takes a NaN or leaves it, by its place among the ranks. What travels here are whole numbers in the order of
the floating point numbers, with NaN beyond the last one: a NaN of any rank is the result, as with `torch.amin` and `torch.amax`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvdtrain.backends.wire import Then, Wire, WireOp, Work

_AS_WHOLE = {torch.float32: torch.int32, torch.float64: torch.int64}


def all_reduce_(wire: Wire, tensor: Tensor, op: WireOp) -> Work:
    """As of a `Wire`."""
    return _in_order(tensor, tensor, op, lambda _, sent: wire.all_reduce_(sent, op))


def reduce_(wire: Wire, tensor: Tensor, op: WireOp, dst: int) -> Work:
    """As of a `Wire`."""
    return _in_order(tensor, tensor, op, lambda _, sent: wire.reduce_(sent, op, dst))


def reduce_scatter_into(wire: Wire, out: Tensor, tensor: Tensor, op: WireOp) -> Work:
    """As of a `Wire`."""
    return _in_order(out, tensor, op, lambda received, sent: wire.reduce_scatter_into(received, sent, op))


def _in_order(out: Tensor, tensor: Tensor, op: WireOp, start: Callable[[Tensor, Tensor], Work]) -> Work:
    if op not in ("min", "max") or tensor.dtype not in _AS_WHOLE:
        return start(out, tensor)
    keys = _keys(tensor, op)
    part = keys if out is tensor else torch.empty_like(out, dtype=keys.dtype)
    return Then(start(part, keys), lambda: out.copy_(_turned(part).view(out.dtype)))


def _keys(tensor: Tensor, op: WireOp) -> Tensor:
    keys = _turned(tensor.view(_AS_WHOLE[tensor.dtype]))
    limits = torch.iinfo(keys.dtype)  # both of them are a NaN's
    return keys.masked_fill_(tensor.isnan(), limits.max if op == "max" else limits.min)


def _turned(bits: Tensor) -> Tensor:
    """All bits but the sign are turned round where it is set: the greater a negative number's magnitude, the less it is. Its own inverse."""
    limits = torch.iinfo(bits.dtype)
    return bits.bitwise_xor(bits.bitwise_right_shift(limits.bits - 1).bitwise_and_(limits.max))
