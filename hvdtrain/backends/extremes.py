"""The least and the greatest number of the ranks, the same on every engine, also where numbers are NaN.

An engine's own comparison takes a NaN or leaves it, by its place among the ranks. What travels here are whole numbers in the order of
the floating point numbers, with NaN beyond the last one: a NaN of any rank is the result, as with `torch.amin` and `torch.amax`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvdtrain.backends.wire import Then, Wire, WireOp, Work

_AS_WHOLE = {torch.float32: torch.int32, torch.float64: torch.int64}


def all_reduce_(wire: Wire, tensor: Tensor, op: WireOp) -> Work:
    """As of a `Wire`."""
    if not _orders(tensor, op):
        return wire.all_reduce_(tensor, op)
    keys = _keys(tensor, op)
    return Then(wire.all_reduce_(keys, op), lambda: tensor.copy_(_numbers(keys, tensor.dtype)))


def reduce_(wire: Wire, tensor: Tensor, op: WireOp, dst: int) -> Work:
    """As of a `Wire`."""
    if not _orders(tensor, op):
        return wire.reduce_(tensor, op, dst)
    keys = _keys(tensor, op)
    return Then(wire.reduce_(keys, op, dst), lambda: tensor.copy_(_numbers(keys, tensor.dtype)))


def reduce_scatter_into(wire: Wire, out: Tensor, tensor: Tensor, op: WireOp) -> Work:
    """As of a `Wire`."""
    if not _orders(tensor, op):
        return wire.reduce_scatter_into(out, tensor, op)
    keys = _keys(tensor, op)
    part = torch.empty_like(out, dtype=keys.dtype)
    return Then(wire.reduce_scatter_into(part, keys, op), lambda: out.copy_(_numbers(part, out.dtype)))


def _orders(tensor: Tensor, op: WireOp) -> bool:
    return op in ("min", "max") and tensor.dtype in _AS_WHOLE


def _keys(tensor: Tensor, op: WireOp) -> Tensor:
    keys = _turned(tensor.view(_AS_WHOLE[tensor.dtype]))
    limits = torch.iinfo(keys.dtype)  # both of them are a NaN's
    return keys.masked_fill_(tensor.isnan(), limits.max if op == "max" else limits.min)


def _numbers(keys: Tensor, dtype: torch.dtype) -> Tensor:
    return _turned(keys).view(dtype)


def _turned(bits: Tensor) -> Tensor:
    """All bits but the sign are turned round where it is set: the greater a negative number's magnitude, the less it is. Its own inverse."""
    limits = torch.iinfo(bits.dtype)
    return bits.bitwise_xor(bits.bitwise_right_shift(limits.bits - 1).bitwise_and_(limits.max))
