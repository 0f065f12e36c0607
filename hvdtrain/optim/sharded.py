"""An optimizer whose state is cut over the ranks: each holds an N-th of it, updates an N-th of the numbers, and all gather.

This is stage 1 of ZeRO (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
https://arxiv.org/abs/1910.02054). Parameters are cut as flat rows of numbers, so that the parts are equal whatever the
parameters' shapes; an optimizer that treats each number by itself computes the same as uncut, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from hvdtrain.backends.communicator import Communicator
from hvdtrain.data.partition import share
from hvdtrain.errors import ConfigError
from hvdtrain.optim.master_weights import MasterWeights
from hvdtrain.optim.pieces import Bucket, Piece, buckets_of, cut_out, flat, joined, laid_out_as, layout_of, on_cpu, runs

ELEMENTWISE = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
"""torch's optimizers that treat each number of a parameter by itself."""


class _Spread(dict[Any, Any]):
    """What stands for the state of an optimizer whose state is spread over the ranks: it can only be forgotten."""

    def __init__(self, inner: Optimizer | None) -> None:
        super().__init__()
        self._inner = inner

    def clear(self) -> None:
        """Forget the state, as if no step had been made; every rank must call it."""
        if self._inner is not None:
            self._inner.state.clear()

    def __missing__(self, parameter: Any) -> NoReturn:
        raise ConfigError(
            "the state of a ShardedOptimizer is spread over the ranks, so that a parameter's cannot be looked up; every rank reads the "
            "whole by state_dict(), and changes it by load_state_dict()"
        )

    def __setitem__(self, parameter: Any, state: Any) -> None:
        self.__missing__(parameter)


class ShardedOptimizer(Optimizer):
    """Wraps one of torch's optimizers; its state is cut over the ranks, everything else is as it was.

    Hand it to `Backend.replicate` or the `Trainer` like any other optimizer; schedules, GradScalers and parameter groups work
    on it. `state_dict` is that of the plain optimizer: it loads at any number of ranks, and into an optimizer that is not
    sharded, and the other way round. Of a `MasterWeights` the masters are cut too.

    Args:
        optimizer: A new one, over parameters that are already on their device. What it holds is taken over.
        communicator: All ranks among which the state is cut, such as a backend.
        elementwise: Promise that an optimizer that is none of `ELEMENTWISE` treats each number of a parameter by itself.

    Raises:
        ConfigError: The optimizer looks at parameters as a whole, or at parameters that cannot be cut.
    """

    spreads_state = True  # asked for by who cuts parameters too

    def __init__(self, optimizer: Optimizer, communicator: Communicator, *, elementwise: bool = False) -> None:
        masters = isinstance(optimizer, MasterWeights)
        kind = optimizer.inner_type if isinstance(optimizer, MasterWeights) else type(optimizer)
        name = kind.__name__
        if not elementwise and not (kind.__module__.startswith("torch.optim") and name in ELEMENTWISE):
            raise ConfigError(
                f"{name} may look at a parameter as a whole, and ShardedOptimizer cuts parameters into pieces; use one of "
                f"{', '.join(ELEMENTWISE)}, or promise elementwise=True"
            )
        self.kind = getattr(optimizer, "kind", name)  # in checkpoints: the whole optimizer reads what this one wrote
        self._communicator = communicator
        self._pieces: list[Piece] = []
        self._buckets: list[Bucket] = []
        self._held: list[nn.Parameter] = []  # in the order of the groups
        self._numel: dict[nn.Parameter, int] = {}
        self._layout: list[tuple[tuple[int, ...], ...]] | None = None  # of them, since the first step
        self._inner: Optimizer | None = None
        self._make = kind
        self._masters = masters
        earlier = optimizer.state_dict() if optimizer.state else None
        super().__init__(optimizer.param_groups, optimizer.defaults)
        if earlier is not None:
            self.load_state_dict(earlier)
            if isinstance(optimizer, MasterWeights) and not optimizer.remembers:
                self._layout = None  # masters alone follow the parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Cut one more group of parameters over the ranks; every rank must call it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        pieces = [piece for bucket in buckets_of(group["params"]) for piece in self._cut(bucket)]
        mine = {**group, "params": [piece.inner for piece in pieces]}
        if self._inner is None:
            inner = self._make([mine], **({"lr": group["lr"]} if "lr" in group else {}))
            self._inner = MasterWeights(inner) if self._masters else inner
        else:
            self._inner.add_param_group(mine)
        self._pieces += pieces
        self._held += group["params"]
        self._numel |= {parameter: parameter.numel() for parameter in group["params"]}
        self._layout = None if self._layout is None else self._layout + layout_of(group["params"])

    @property  # type: ignore[override]
    def state(self) -> dict[Any, Any]:
        """Nothing to look into; ``clear()``, or to set it to an empty one, forgets the state of every rank."""
        return _Spread(self._inner)

    @state.setter
    def state(self, state: dict[Any, Any]) -> None:
        spread = _Spread(self._inner)
        for parameter in state:
            spread.__missing__(parameter)
        spread.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update this rank's part of every parameter, and give it to all; every rank must call it.

        Raises:
            ConfigError: A closure was given, a gradient is sparse, or parameters are no more what was cut.
        """
        if closure is not None:
            raise ConfigError("ShardedOptimizer.step takes no closure")
        self._check_parameters()
        for piece in self._pieces:
            grad = piece.parameter.grad
            piece.inner.data = flat(piece.parameter)[piece.numbers]
            piece.inner.grad = None if grad is None else laid_out_as(grad, piece.parameter)[piece.numbers]
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
        """Return the state of the plain optimizer, whole on every rank, on the CPU; every rank must call it.

        Raises:
            ConfigError: Parameters are no more what was cut.
        """
        return self._whole(self._communicator.all_gather_object)

    def state_on_rank_zero(self) -> dict[str, Any]:
        """As `state_dict`, whole on rank 0 alone; the others have its settings without a state. Every rank must call it.

        Raises:
            ConfigError: Parameters are no more what was cut.
        """
        return self._whole(self._communicator.gather_object)

    def _whole(self, gather: Callable[[Any], list[Any] | None]) -> dict[str, Any]:
        assert self._inner is not None
        self._check_parameters()
        held = self._inner.state
        mine = [held.get(piece.inner, {}) for piece in self._pieces]
        everyone: list[list[dict[str, Any]]] | None = gather([on_cpu(state) for state in mine])
        whole = super().state_dict()
        if everyone is None:
            return {**whole, "state": {}}
        parts: dict[int, dict[str, list[tuple[slice, Any]]]] = {}
        for states, places in zip(everyone, self._places(), strict=True):
            for of_piece, (index, numbers) in zip(states, places, strict=True):
                for name, value in of_piece.items():
                    parts.setdefault(index, {}).setdefault(name, []).append((numbers, value))
        parameters = self._parameters()
        state = {
            index: {name: joined(parameters[index], pieces) for name, pieces in parts[index].items()}
            for index in sorted(parts)
        }
        whole["state"] = state
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of the state of a plain optimizer.

        Raises:
            ValueError: It is another optimizer's, as torch says it.
        """
        self._check_parameters()
        groups = self.param_groups
        super().load_state_dict({**state_dict, "state": {}})
        for group, loaded in zip(groups, self.param_groups, strict=True):  # a schedule may hold them
            group.clear()
            group.update(loaded)
        self.param_groups = groups
        assert self._inner is not None
        index = {parameter: at for at, parameter in enumerate(self._parameters())}
        held = self._inner.state
        held.clear()
        group_of = {parameter: group for group in groups for parameter in group["params"]}
        for piece in self._pieces:
            state = state_dict["state"].get(index[piece.parameter])
            if state is not None:
                on_device = any(group_of[piece.parameter].get(option) for option in ("capturable", "fused"))
                held[piece.inner] = {
                    name: cut_out(name, value, piece, counters_too=on_device) for name, value in state.items()
                }

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ConfigError(
            "a ShardedOptimizer can be neither copied nor pickled, because its state is spread over the ranks; every rank calls its "
            "state_dict(), and what that returns can be"
        )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _check_parameters(self) -> None:
        """Refuse what would be cut otherwise than the state was, or differently than the plain optimizer computes."""
        parameters = self._parameters()
        if len(parameters) != len(self._held) or any(a is not b for a, b in zip(parameters, self._held, strict=True)):
            raise ConfigError(
                "parameters were taken out of a ShardedOptimizer's param_groups, or put into them, after these were cut over the ranks; "
                "freeze what is not to be trained, put more in by add_param_group(), or make a new ShardedOptimizer"
            )
        layout = layout_of(parameters)
        before = layout if self._layout is None else self._layout
        for parameter, now, first in zip(parameters, layout, before, strict=True):
            if now != first or parameter.numel() != self._numel[parameter]:
                raise ConfigError(
                    f"a parameter has shape {now[0]} and strides {now[1]}, and its {self._numel[parameter]} numbers lay otherwise when they were "
                    "cut over the ranks; resize it before the ShardedOptimizer is made, and change its memory format before the first step"
                )
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise ConfigError(
                    "a gradient is sparse, and ShardedOptimizer cuts dense ones; make the layer dense (nn.Embedding(sparse=False)), or leave "
                    "the optimizer whole"
                )
        self._layout = before

    def _cut(self, bucket: Bucket) -> Iterator[Piece]:
        self._buckets.append(bucket)
        wire = self._communicator.wire
        for parameter, numbers in runs(bucket, share(bucket.numel, wire.size, wire.rank)):
            yield Piece(parameter, numbers, nn.Parameter(flat(parameter.detach())[numbers]))

    def _places(self) -> list[list[tuple[int, slice]]]:
        """Of each rank's pieces, which parameter they belong to, and where they lie in it."""
        index = {parameter: at for at, parameter in enumerate(self._parameters())}
        size = self._communicator.wire.size
        return [
            [
                (index[parameter], numbers)
                for bucket in self._buckets
                for parameter, numbers in runs(bucket, share(bucket.numel, size, rank))
            ]
            for rank in range(size)
        ]

    def _gather(self, bucket: Bucket) -> None:
        """Give everybody this rank's new numbers, and take theirs."""
        wire = self._communicator.wire
        if wire.size == 1:
            return
        parts = [share(bucket.numel, wire.size, rank) for rank in range(wire.size)]
        own = [flat(parameter)[numbers] for parameter, numbers in runs(bucket, parts[wire.rank])]
        sent = torch.cat(own) if own else bucket.parameters[0].new_empty(0)
        for rank, received in enumerate(self._communicator.all_gather(sent)):
            at = 0
            for parameter, numbers in [] if rank == wire.rank else runs(bucket, parts[rank]):
                length = numbers.stop - numbers.start
                flat(parameter)[numbers] = received[at : at + length]
                at += length
