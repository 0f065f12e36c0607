"""An optimizer whose state is cut over the ranks: each holds an N-th of it, updates an N-th of the numbers, and all gather.

This is stage 1 of ZeRO (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
https://arxiv.org/abs/1910.02054). Parameters are cut as flat rows of numbers, so that the parts are equal whatever the
parameters' shapes; an optimizer that treats each number by itself computes the same as uncut, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdtrain.backends.communicator import Communicator
from hvdtrain.data.partition import share
from hvdtrain.errors import ConfigError

ELEMENTWISE = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
"""torch's optimizers that treat each number of a parameter by itself."""
_COUNTERS = (
    "step",
    "eta",
    "mu",
    "mu_product",
)  # what torch's keep once a parameter; it may have a parameter's shape, if that is ()
_BUCKET_BYTES = 64 * 2**20  # about what is gathered at a time


@dataclass(slots=True, eq=False)
class _Piece:
    """What this rank updates of one parameter: a run of its numbers, as a parameter for the inner optimizer."""

    parameter: nn.Parameter
    numbers: slice
    inner: nn.Parameter


@dataclass(slots=True, eq=False)
class _Bucket:
    """Parameters of one type whose numbers, one after the other, are cut over the ranks."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    numel: int = 0


class ShardedOptimizer(Optimizer):
    """Wraps one of torch's optimizers; its state is cut over the ranks, everything else is as it was.

    Hand it to `Backend.replicate` or the `Trainer` like any other optimizer; schedules, GradScalers and parameter groups work
    on it. `state_dict` is that of the plain optimizer: it loads at any number of ranks, and into an optimizer that is not
    sharded, and the other way round.

    Args:
        optimizer: A new one, over parameters that are already on their device. What it holds is taken over.
        communicator: All ranks among which the state is cut, such as a backend.
        elementwise: Promise that an optimizer that is none of `ELEMENTWISE` treats each number of a parameter by itself.

    Raises:
        ConfigError: The optimizer looks at parameters as a whole, or at parameters that cannot be cut.
    """

    def __init__(self, optimizer: Optimizer, communicator: Communicator, *, elementwise: bool = False) -> None:
        name = type(optimizer).__name__
        if not elementwise and not (type(optimizer).__module__.startswith("torch.optim") and name in ELEMENTWISE):
            raise ConfigError(
                f"{name} may look at a parameter as a whole, and ShardedOptimizer cuts parameters into pieces; use one of "
                f"{', '.join(ELEMENTWISE)}, or promise elementwise=True"
            )
        self.kind = name  # in checkpoints: the plain optimizer reads what this one wrote
        self._communicator = communicator
        self._pieces: list[_Piece] = []
        self._buckets: list[_Bucket] = []
        self._inner: Optimizer | None = None
        self._make = type(optimizer)
        earlier = optimizer.state_dict() if optimizer.state else None
        super().__init__(optimizer.param_groups, optimizer.defaults)
        if earlier is not None:
            self.load_state_dict(earlier)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Cut one more group of parameters over the ranks; every rank must call it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        pieces = [piece for bucket in _buckets(group["params"]) for piece in self._cut(bucket)]
        mine = {**group, "params": [piece.inner for piece in pieces]}
        if self._inner is None:
            self._inner = self._make([mine], **({"lr": group["lr"]} if "lr" in group else {}))
        else:
            self._inner.add_param_group(mine)
        self._pieces += pieces

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update this rank's part of every parameter, and give it to all; every rank must call it.

        Raises:
            ConfigError: A closure was given.
        """
        if closure is not None:
            raise ConfigError("ShardedOptimizer.step takes no closure")
        for piece in self._pieces:
            grad = piece.parameter.grad
            piece.inner.data = _flat(piece.parameter)[piece.numbers]
            piece.inner.grad = None if grad is None else _laid_out_as(grad, piece.parameter)[piece.numbers]
        assert self._inner is not None
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({name: value for name, value in group.items() if name != "params"})
        self._inner.step()
        for piece in self._pieces:
            piece.inner.grad = None
        for bucket in self._buckets:
            if any(parameter.grad is not None for parameter in bucket.parameters):  # alike on all ranks, once exchanged
                self._gather(bucket)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the plain optimizer, whole on every rank; every rank must call it."""
        assert self._inner is not None
        mine = [self._inner.state.get(piece.inner, {}) for piece in self._pieces]
        everyone: list[list[dict[str, Any]]] = self._communicator.all_gather_object([_on_cpu(state) for state in mine])
        parts: dict[int, dict[str, list[tuple[slice, Any]]]] = {}
        for states, places in zip(everyone, self._places(), strict=True):
            for of_piece, (index, numbers) in zip(states, places, strict=True):
                for name, value in of_piece.items():
                    parts.setdefault(index, {}).setdefault(name, []).append((numbers, value))
        parameters = self._parameters()
        state = {
            index: {name: _joined(parameters[index], pieces) for name, pieces in parts[index].items()}
            for index in sorted(parts)
        }
        whole = super().state_dict()
        whole["state"] = state
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of the state of a plain optimizer.

        Raises:
            ValueError: It is another optimizer's, as torch says it.
        """
        super().load_state_dict({**state_dict, "state": {}})
        assert self._inner is not None
        index = {parameter: at for at, parameter in enumerate(self._parameters())}
        self._inner.state.clear()
        for piece in self._pieces:
            state = state_dict["state"].get(index[piece.parameter])
            if state is not None:
                self._inner.state[piece.inner] = {name: _cut_out(name, value, piece) for name, value in state.items()}

    # -- inside -------------------------------------------------------------------------------------------------------

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _cut(self, bucket: _Bucket) -> Iterator[_Piece]:
        self._buckets.append(bucket)
        wire = self._communicator.wire
        for parameter, numbers in _runs(bucket, share(bucket.numel, wire.size, wire.rank)):
            yield _Piece(parameter, numbers, nn.Parameter(_flat(parameter.detach())[numbers]))

    def _places(self) -> list[list[tuple[int, slice]]]:
        """Of each rank's pieces, which parameter they belong to, and where they lie in it."""
        index = {parameter: at for at, parameter in enumerate(self._parameters())}
        size = self._communicator.wire.size
        return [
            [
                (index[parameter], numbers)
                for bucket in self._buckets
                for parameter, numbers in _runs(bucket, share(bucket.numel, size, rank))
            ]
            for rank in range(size)
        ]

    def _gather(self, bucket: _Bucket) -> None:
        """Give everybody this rank's new numbers, and take theirs."""
        wire = self._communicator.wire
        if wire.size == 1:
            return
        parts = [share(bucket.numel, wire.size, rank) for rank in range(wire.size)]
        own = [_flat(parameter)[numbers] for parameter, numbers in _runs(bucket, parts[wire.rank])]
        sent = torch.cat(own) if own else bucket.parameters[0].new_empty(0)
        for rank, received in enumerate(self._communicator.all_gather(sent)):
            at = 0
            for parameter, numbers in [] if rank == wire.rank else _runs(bucket, parts[rank]):
                length = numbers.stop - numbers.start
                _flat(parameter)[numbers] = received[at : at + length]
                at += length


def _buckets(parameters: list[nn.Parameter]) -> list[_Bucket]:
    found: list[_Bucket] = []
    open_ones: dict[torch.dtype, _Bucket] = {}
    for parameter in parameters:
        if parameter.layout != torch.strided:
            raise ConfigError(
                f"a parameter of layout {parameter.layout} cannot be cut over the ranks; leave the optimizer whole"
            )
        bucket = open_ones.get(parameter.dtype)
        if bucket is None or bucket.numel * parameter.element_size() >= _BUCKET_BYTES:
            bucket = open_ones[parameter.dtype] = _Bucket()
            found.append(bucket)
        bucket.parameters.append(parameter)
        bucket.numel += parameter.numel()
    return found


def _runs(bucket: _Bucket, numbers: range) -> Iterator[tuple[nn.Parameter, slice]]:
    """What a run of a bucket's numbers is of each parameter."""
    begin = 0
    for parameter in bucket.parameters:
        first, last = max(numbers.start, begin) - begin, min(numbers.stop, begin + parameter.numel()) - begin
        if first < last:
            yield parameter, slice(first, last)
        elif not parameter.numel() and not numbers.start:  # an optimizer keeps count of it all the same
            yield parameter, slice(0, 0)
        begin += parameter.numel()


def _flat(parameter: Tensor) -> Tensor:
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


def _laid_out_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor's numbers in the order in which the parameter's lie in memory."""
    if tensor.stride() != parameter.stride():
        tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
    return _flat(tensor)


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}


def _joined(parameter: nn.Parameter, parts: list[tuple[slice, Any]]) -> Any:
    """A state of the whole parameter from those of its pieces."""
    numbers, value = parts[0]
    if not (isinstance(value, Tensor) and value.shape == (numbers.stop - numbers.start,) and value.dim() == 1):
        return value  # the number of steps and the like
    whole = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    flat = _flat(whole)
    for numbers, value in parts:
        flat[numbers] = value.to(flat.device)
    return whole


def _cut_out(name: str, value: Any, piece: _Piece) -> Any:
    """A piece's part of a state of the whole parameter."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != piece.parameter.shape or name in _COUNTERS:
        return value.clone()
    state = value.to(piece.parameter.device)
    return _laid_out_as(state, piece.parameter)[piece.numbers].clone()
