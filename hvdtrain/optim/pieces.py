"""Parameters cut over ranks as flat rows of numbers, in the order in which they lie in memory, and states cut alike.

Pure arithmetic on this rank's tensors; `hvdtrain.optim.sharded` moves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError

_COUNTERS = (
    "step",
    "eta",
    "mu",
    "mu_product",
)  # what torch's keep once a parameter; it may have a parameter's shape, if that is ()
_BUCKET_BYTES = 64 * 2**20  # about what is gathered at a time


@dataclass(slots=True, eq=False)
class Piece:
    """What this rank updates of one parameter: a run of its numbers, as a parameter for the inner optimizer."""

    parameter: nn.Parameter
    numbers: slice
    inner: nn.Parameter


@dataclass(slots=True, eq=False)
class Bucket:
    """Parameters of one type whose numbers, one after the other, are cut over the ranks."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    numel: int = 0


def buckets_of(parameters: list[nn.Parameter]) -> list[Bucket]:
    """Put parameters into buckets, in their order.

    Raises:
        ConfigError: One of them cannot be cut.
    """
    found: list[Bucket] = []
    open_ones: dict[torch.dtype, Bucket] = {}
    for parameter in parameters:
        if parameter.layout != torch.strided:
            raise ConfigError(
                f"a parameter of layout {parameter.layout} cannot be cut over the ranks; leave the optimizer whole"
            )
        bucket = open_ones.get(parameter.dtype)
        if bucket is None or bucket.numel * parameter.element_size() >= _BUCKET_BYTES:
            bucket = open_ones[parameter.dtype] = Bucket()
            found.append(bucket)
        bucket.parameters.append(parameter)
        bucket.numel += parameter.numel()
    return found


def runs(bucket: Bucket, numbers: range) -> Iterator[tuple[nn.Parameter, slice]]:
    """What a run of a bucket's numbers is of each parameter."""
    begin = 0
    for parameter in bucket.parameters:
        first, last = max(numbers.start, begin) - begin, min(numbers.stop, begin + parameter.numel()) - begin
        if first < last:
            yield parameter, slice(first, last)
        elif not parameter.numel() and not numbers.start:  # an optimizer keeps count of it all the same
            yield parameter, slice(0, 0)
        begin += parameter.numel()


def flat(parameter: Tensor) -> Tensor:
    """The numbers of a parameter, in the order in which they lie in memory."""
    data = parameter.detach()
    if data.is_contiguous():
        return data.view(-1)
    strides = data.stride()
    permuted = data.permute(sorted(range(data.dim()), key=lambda dim: (-strides[dim], dim)))
    if not permuted.is_contiguous():
        raise ConfigError(
            f"a parameter of shape {tuple(data.shape)} and strides {strides} does not lie in one piece of memory; make it "
            "contiguous before the optimizer is made"
        )
    return permuted.view(-1)


def laid_out_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor's numbers in the order in which the parameter's lie in memory."""
    if tensor.stride() != parameter.stride():
        tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
    return flat(tensor)


def layout_of(parameters: list[nn.Parameter]) -> list[tuple[tuple[int, ...], ...]]:
    """Return each parameter's shape and strides."""
    return [(tuple(parameter.shape), parameter.stride()) for parameter in parameters]


def on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """Return a piece's state with its tensors on the CPU."""
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}


def joined(parameter: nn.Parameter, parts: list[tuple[slice, Any]]) -> Any:
    """A state of the whole parameter from those of its pieces."""
    numbers, value = parts[0]
    if not (isinstance(value, Tensor) and value.shape == (numbers.stop - numbers.start,) and value.dim() == 1):
        return value  # the number of steps and the like
    whole = torch.empty_like(parameter, dtype=value.dtype, device="cpu", requires_grad=False)  # it may fit nowhere else
    row = flat(whole)
    for numbers, value in parts:
        row[numbers] = value
    return whole


def cut_out(name: str, value: Any, piece: Piece, *, counters_too: bool) -> Any:
    """A piece's part of a state of the whole parameter, on the parameter's device; what counts steps only if it is wanted there."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != piece.parameter.shape or name in _COUNTERS:
        return value.to(piece.parameter.device, copy=True) if counters_too else value.clone()
    state = value.to(piece.parameter.device)
    return laid_out_as(state, piece.parameter)[piece.numbers].clone()
