"""Factors before and after a reduction, as Horovod defines them, in arithmetic that neither overflows nor drifts; and sums made here.

Integers are multiplied in float64 and cut; float16 and bfloat16 in float32. An average of floats divides before it is rounded
to a narrow type, so that float16 60000 + 60000 is not infinite; one of integers is added up in a wider type and cut towards zero, once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvdtrain.backends.forms import WIRE_DTYPE
from hvdtrain.horovod.reductions import Average

_WIDER = {torch.int8: torch.int32, torch.uint8: torch.int32, torch.int32: torch.int64}
_NARROW = (torch.float16, torch.bfloat16)


def summed_in(dtype: torch.dtype, op: int) -> torch.dtype:
    """The dtype in which an engine reduces tensors of ``dtype``: one in which what is to be divided does not overflow."""
    return _WIDER.get(dtype, WIRE_DTYPE[dtype]) if op == Average else WIRE_DTYPE[dtype]


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """``tensor`` times ``factor``, in its own dtype; the tensor itself if the factor is 1."""
    if factor == 1.0:
        return tensor
    if tensor.dtype in _NARROW:
        return (tensor.float() * factor).to(tensor.dtype)
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor * factor
    return (tensor.double() * factor).to(tensor.dtype)


def scale_(buffer: Tensor, dtype: torch.dtype, factor: float, divisor: int) -> None:
    """Divide a sum by ``divisor`` and multiply it by ``factor``, in place.

    Args:
        buffer: The sum, in the dtype in which it was reduced.
        dtype: What the user has: integers are cut.
        factor: The user's.
        divisor: Ranks of an average; 1 for none.
    """
    if dtype.is_floating_point or dtype.is_complex:
        if divisor != 1:
            buffer.div_(divisor)
        if factor != 1.0:
            buffer.mul_(factor)
        return
    if factor != 1.0:
        buffer.copy_(buffer.double() * factor / divisor)
    elif divisor != 1:
        buffer.copy_(torch.div(buffer, divisor, rounding_mode="trunc"))


def added(rows: Sequence[Tensor]) -> Tensor:
    """The sum of two ranks' numbers or more, in the order of the ranks: the same bits however it comes to be computed."""
    total = rows[0] + rows[1]
    for row in rows[2:]:
        total += row
    return total
