"""Which MPI datatype and operation carries which torch dtype and ReduceOp.

MPI has no 16-bit floats: what must be summed in them is summed by us (`operations.all_reduce_`). It never gets them as
bytes to add, which some bindings do in silence.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

Kind: Any = dist.ReduceOp.RedOpType

FLOATS = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE}
COMPLEX = {torch.complex64: MPI.C_FLOAT_COMPLEX, torch.complex128: MPI.C_DOUBLE_COMPLEX}
INTEGERS = {
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint8: MPI.UINT8_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
}
BOOL = {torch.bool: MPI.C_BOOL}
HALVES = (torch.float16, torch.bfloat16)
NATIVE = {**FLOATS, **COMPLEX, **INTEGERS, **BOOL}

_SUMS = {Kind.SUM: MPI.SUM, Kind.AVG: MPI.SUM, Kind.PREMUL_SUM: MPI.SUM}
_ORDERED = {Kind.MIN: MPI.MIN, Kind.MAX: MPI.MAX}
_BITS = {Kind.BAND: MPI.BAND, Kind.BOR: MPI.BOR, Kind.BXOR: MPI.BXOR}
_PRODUCT = {Kind.PRODUCT: MPI.PROD}
# As NCCL has it: a sum of booleans is "any of them".
_LOGICAL = {
    Kind.SUM: MPI.LOR, Kind.MAX: MPI.LOR, Kind.BOR: MPI.LOR,
    Kind.PRODUCT: MPI.LAND, Kind.MIN: MPI.LAND, Kind.BAND: MPI.LAND, Kind.BXOR: MPI.LXOR,
}  # fmt: skip


def kind_of(op: Any) -> Any:
    """The kind of a ReduceOp, whichever of its two classes it is."""
    return op if isinstance(op, Kind) else op.op


def premultiplier(op: Any) -> float | Tensor:
    """The factor of a PREMUL_SUM."""
    found: float | Tensor = op.__getstate__()[1]
    return found


@functools.cache
def mpi_op(kind: Any, dtype: torch.dtype) -> MPI.Op:
    """The MPI operation for a reduction of ``dtype``.

    Raises:
        TypeError: MPI cannot; says what could be done instead.
    """
    if dtype in BOOL:
        table = _LOGICAL
    elif dtype in INTEGERS:
        table = {Kind.SUM: MPI.SUM, **_ORDERED, **_BITS, **_PRODUCT}
    elif dtype in COMPLEX:
        table = {**_SUMS, **_PRODUCT}
    elif dtype in FLOATS or dtype in HALVES:
        table = {**_SUMS, **_ORDERED, **_PRODUCT}
    else:
        names = ", ".join(str(known).removeprefix("torch.") for known in (*NATIVE, *HALVES))
        raise TypeError(f"the mpi4py process group cannot reduce {dtype}; it reduces {names}: convert the tensor first")
    if kind not in table:
        hint = "; use SUM and divide" if kind in (Kind.AVG, Kind.PREMUL_SUM) else ""
        raise TypeError(
            f"{kind.name} of {dtype} is not defined; for {dtype} there are {', '.join(k.name for k in table)}{hint}"
        )
    return table[kind]


def memory(tensor: Tensor, start: int = 0, count: int | None = None) -> list[Any]:
    """What MPI is to read or write: elements of a contiguous tensor of a dtype in `NATIVE`."""
    count = tensor.numel() - start if count is None else count
    size = tensor.element_size()
    address = tensor.data_ptr() + start * size
    return [MPI.memory.fromaddress(address, count * size), NATIVE[tensor.dtype]]  # MPI's count follows from the size


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes, for operations that only move it. The tensor must be contiguous."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # of one element, reshape may leave another stride
    return torch.view_as_real(flat).reshape(-1).view(torch.uint8) if flat.is_complex() else flat.view(torch.uint8)
