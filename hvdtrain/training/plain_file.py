"""A plain state (`hvdtrain.training.plain_state`) as JSON and tensors for safetensors: neither can hold anything that runs.

JSON has no tensors, infinities or NaN: a tensor is a reference to one in the safetensors file, which has also what
safetensors leaves out (the order in which its dimensions lie in memory, and types that not all its versions know). A tensor
that stands in two places is written once, and comes back as one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvdtrain.backends.layout import bytes_of
from hvdtrain.errors import CheckpointError

_TYPE = "__type__"  # the one key that `to_plain` leaves to others
_STORED = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip


@dataclass(slots=True)
class Packed:
    """A state in two parts.

    Attributes:
        tree: For JSON.
        tensors: For safetensors, on the CPU and contiguous, by the names that ``tree`` refers to.
    """

    tree: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


def pack(value: Any, where: str) -> Packed:
    """Take a plain state apart.

    Args:
        value: As `to_plain` returns it.
        where: How messages name it.

    Raises:
        CheckpointError: Something in it is not plain; the message says where and what.
    """
    packing = _Packing()
    packing.packed.tree = packing.tree(value, where)
    return packing.packed


def unpack(packed: Packed, where: str) -> Any:
    """Return the state that `pack` was given.

    Raises:
        CheckpointError: The parts do not fit each other, or hold what `pack` never writes.
    """
    try:
        return _Unpacking(packed.tensors).value(packed.tree)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where} is no state of hvdtrain's: {type(error).__name__}: {error}") from error


def to_json(tree: Any) -> bytes:
    """The one way in which a tree is written."""
    return (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode("ascii")


def from_json(text: bytes, where: str) -> Any:
    """Return what `to_json` was given.

    Raises:
        CheckpointError: It was not written by `to_json`, or has been changed since.
    """
    try:
        tree = json.loads(text.decode("ascii"), object_pairs_hook=_without_twins)
        same = to_json(tree) == text
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: it is no JSON of hvdtrain's ({error})") from error
    if not same:
        raise CheckpointError(f"{where} is damaged: it is not as hvdtrain wrote it")
    return tree


class _Packing:
    """One walk over a state."""

    def __init__(self) -> None:
        self.packed = Packed()
        self._written: dict[tuple[Any, ...], dict[str, Any]] = {}

    def tree(self, value: Any, where: str) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {_TYPE: "float", "value": repr(value)}
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if type(value) is list:
            return [self.tree(item, f"{where}[{index}]") for index, item in enumerate(value)]
        if (
            type(value) is dict
            and all(type(key) is str for key in value)
            and value.get(_TYPE) not in ("tensor", "float")
        ):
            return {key: self.tree(item, f"{where}[{key!r}]") for key, item in value.items()}
        raise CheckpointError(f"{where} cannot be saved: it is a {type(value).__qualname__}, and not a plain value")

    def _tensor(self, value: Tensor, where: str) -> dict[str, Any]:
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type == "meta":
            kind = "quantized" if value.is_quantized else "nested" if value.is_nested else str(value.layout)
            raise CheckpointError(
                f"{where} cannot be saved: it is a tensor that is {value.device if value.device.type == 'meta' else kind}; "
                "only dense ones can"
            )
        key = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and key in self._written:
            return self._written[key]
        name = str(len(self.packed.tensors))
        reference: dict[str, Any] = {_TYPE: "tensor", "name": name}
        plain = value.detach().resolve_conj().resolve_neg().cpu()
        order = _memory_order(plain)
        if order is not None:
            reference["order"] = order
        plain = plain.contiguous()
        if plain.dtype not in _STORED:
            reference["dtype"] = str(plain.dtype).removeprefix("torch.")
            reference["shape"] = list(plain.shape)
            plain = bytes_of(plain)
        self.packed.tensors[name] = plain
        self._written[key] = reference
        return reference


class _Unpacking:
    """The way back."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._made: dict[str, Tensor] = {}

    def value(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self.value(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        if tree.get(_TYPE) == "float":
            return float(tree["value"])
        if tree.get(_TYPE) == "tensor":
            name = tree["name"]
            if name not in self._made:
                self._made[name] = self._tensor(tree)
            return self._made[name]
        return {key: self.value(item) for key, item in tree.items()}

    def _tensor(self, reference: dict[str, Any]) -> Tensor:
        tensor = self._tensors[reference["name"]]
        if "dtype" in reference:
            dtype = getattr(torch, reference["dtype"])
            tensor = tensor.view(dtype).reshape(reference["shape"])
        if "order" in reference:
            order = reference["order"]
            back = sorted(range(len(order)), key=order.__getitem__)
            tensor = tensor.permute(order).contiguous().permute(back)
        return tensor


def _memory_order(tensor: Tensor) -> list[int] | None:
    """The order of dimensions in which a tensor's elements lie without gaps (channels last, say); None for the usual one."""
    if tensor.is_contiguous() or not tensor.numel():
        return None
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], -tensor.shape[dim]))
    return order if tensor.permute(order).is_contiguous() else None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key is there twice")
    return tree
