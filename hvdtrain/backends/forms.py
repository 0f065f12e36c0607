"""What a tensor must be to travel between ranks, and how ranks tell each other what comes.

Nothing here communicates.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hvdtrain.backends.layout import bytes_of
from hvdtrain.errors import CollectiveError
from hvdtrain.ranks.frames import proof, same

_SIGNATURE_BYTES = 32

ReduceOp = Literal["sum", "mean", "min", "max", "product"]

WIRE_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,  # no engine sums halves with float32's care, and some cannot at all
    torch.bfloat16: torch.float32,
    torch.int64: torch.int64,
    torch.int32: torch.int32,
    torch.int16: torch.int32,  # Gloo has no 16-bit integers
    torch.int8: torch.int8,
    torch.uint8: torch.uint8,
    torch.bool: torch.uint8,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
"""Every dtype that travels, and the one in which it is reduced."""
_DTYPES = list(WIRE_DTYPE)
_MAX_DIMS = 8
HEADER = 2 + _MAX_DIMS
"""Integers of a `header`."""


def differentiated(tensor: object) -> bool:
    """Whether autograd records what is done with ``tensor``."""
    return isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled()


def refuse_gradient(name: str, tensor: object) -> None:
    """Raise CollectiveError if the result of a collective that cannot be differentiated would have to be."""
    if differentiated(tensor):
        raise CollectiveError(f"{name} of a tensor that requires grad cannot be differentiated; pass tensor.detach()")


def check_tensor(name: str, tensor: object) -> None:
    """Raise CollectiveError unless ``tensor`` is one that every engine can carry."""
    if not isinstance(tensor, Tensor):
        raise CollectiveError(
            f"{name} takes a torch.Tensor, got {type(tensor).__name__}; for other objects use all_gather_object or broadcast_object"
        )
    if tensor.layout != torch.strided:
        raise CollectiveError(f"{name} takes dense tensors, got layout {tensor.layout}; use tensor.to_dense()")
    if tensor.dtype not in WIRE_DTYPE:
        known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise CollectiveError(f"{name} cannot carry {tensor.dtype}; convert to one of {known}")
    if tensor.dim() > _MAX_DIMS:
        raise CollectiveError(f"{name} takes up to {_MAX_DIMS} dimensions, got {tensor.dim()}; reshape the tensor")


def header(tensor: Tensor) -> Tensor:
    """Dtype and shape as `HEADER` integers."""
    shape = list(tensor.shape)
    return torch.tensor(
        [_DTYPES.index(tensor.dtype), len(shape), *shape, *[0] * (_MAX_DIMS - len(shape))], device="cpu"
    )


def read_header(row: list[int]) -> tuple[torch.dtype, tuple[int, ...]]:
    """The dtype and shape that a `header` says."""
    return _DTYPES[row[0]], tuple(row[2 : 2 + row[1]])


def numel(shape: tuple[int, ...]) -> int:
    """The number of elements of a shape."""
    product = 1
    for extent in shape:
        product *= extent
    return product


def as_bytes(tensor: Tensor, device: torch.device) -> Tensor:
    """The values of ``tensor``, flat, as uint8 on ``device``: its own memory where it lies so already."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return bytes_of(plain.to(device).contiguous())


def by_rank(ranks: Sequence[int], values: Sequence[object]) -> str:
    """'rank 0, 2: x; rank 1: y'."""
    groups: dict[str, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        groups.setdefault(str(value), []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, members))}: {value}" for value, members in groups.items())


def pickled(obj: object, key: bytes) -> Tensor:
    """An object's bytes, behind a signature by which the other ranks know that one of them has made it.

    Args:
        obj: Any object that pickle takes.
        key: All ranks' of the job; b"" in a world of one.
    """
    buffer = io.BytesIO()
    buffer.write(bytes(_SIGNATURE_BYTES))
    pickle.dump(obj, buffer, protocol=pickle.HIGHEST_PROTOCOL)
    content = buffer.getbuffer()
    content[:_SIGNATURE_BYTES] = proof(key, "object", content[_SIGNATURE_BYTES:])
    return torch.frombuffer(content, dtype=torch.uint8)


def unpickled(data: Tensor, key: bytes) -> object:
    """The object that `pickled` was given.

    Raises:
        CollectiveError: No rank of this job has signed it. It has not been unpickled.
    """
    content = data.cpu().numpy().tobytes()
    if not same(content[:_SIGNATURE_BYTES], proof(key, "object", content[_SIGNATURE_BYTES:])):
        raise CollectiveError(
            f"what arrived as an object ({len(content)} bytes) does not bear this job's signature, and was not unpickled: the "
            "ranks called different collectives, or somebody else sends to them"
        )
    return pickle.loads(memoryview(content)[_SIGNATURE_BYTES:])
