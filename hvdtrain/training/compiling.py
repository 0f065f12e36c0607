"""torch.compile for a model that stays what it is: the same object, the same type, the same names in its state_dict.

`torch.nn.Module.compile` would do, but leaves models that are made of torch's own modules alone uncompiled, without a word
(seen with torch 2.13), and `torch.compile(model)` returns another module.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hvdtrain.backends.base import Backend
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.units import units_of
from hvdtrain.errors import ConfigError
from hvdtrain.training.activation_checkpointing import recomputes
from hvdtrain.training.loop_state import left_as_it_was

LONGEST_S = 3600.0
"""How long ranks wait for others that still compile, if that is more than the time-out of a step."""

_log = logging.getLogger(__name__)


class CompiledForward:
    """Takes the place of a module's ``forward``; a copy of the module gets one of its own.

    Attributes:
        called: Whether it ever was.
        before: Called with it and its arguments before each call, or None.
    """

    def __init__(self, plain: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._plain, self._options = plain, dict(options)
        self._compiled = torch.compile(_inlined(plain), **self._options)
        self.called = False
        self.before: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the plain one does."""
        self.called = True
        if self.before is not None:
            self.before(self._compiled, args, kwargs)
        return self._compiled(*args, **kwargs)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self._plain, self._options)


def compile_model(
    model: nn.Module, options: Mapping[str, Any] | None = None, *, shard_modules: str | None = None
) -> None:
    """As `compile_module`, of the parts that are computed in one piece.

    Args:
        model: Whole, before `Backend.replicate`.
        options: Arguments of `torch.compile`.
        shard_modules: As for `Backend.replicate`. Parameters are gathered around each module that it names, where a compiler
            would have to break its graph: these are compiled, each by itself, as far as they hold none of the others.

    Raises:
        ConfigError: As for `compile_module`, or no module has such a name.
    """
    if shard_modules is None:
        compile_module(model, options)
        return
    units = units_of(model, shard_modules)
    for name, unit in units.items():
        if not any(other.startswith(f"{name}.") for other in units):
            compile_module(unit, options)


def compile_module(model: nn.Module, options: Mapping[str, Any] | None = None) -> None:
    """Compile a model's forward pass and its backward pass, in place, when they are first run.

    Args:
        model: After `hvdtrain.checkpoint_activations`, if that is used.
        options: Arguments of `torch.compile`.

    Raises:
        ConfigError: It is compiled already, there are no such options, or its checkpointed activations would differ.
    """
    if not isinstance(options or {}, Mapping):
        raise ConfigError(f"compile must be true, false or a dictionary of torch.compile's arguments, got {options!r}")
    whole = isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None
    if whole or isinstance(model.forward, CompiledForward):
        raise ConfigError(f"this {type(model).__name__} is compiled already; compile it once")
    engine = (options or {}).get("backend")
    if str(engine).startswith("eager") and recomputes(model):
        raise ConfigError(
            f"torch.compile's backend {engine!r} compiles no backward pass: activations that are checkpointed (--checkpoint-modules) would be "
            "computed again with other random numbers, as of dropout, and running statistics counted twice; use inductor, or aot_eager"
        )
    try:
        model.forward = CompiledForward(model.forward, options or {})
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"torch.compile does not take {dict(options or {})}: {error}") from error


def compile_ahead(backend: Backend, replica: Replica, forward: Callable[[nn.Module], Tensor] | None) -> float:
    """Let every rank compile now, before the first step, and wait for the slowest; every rank must call it.

    Nothing is exchanged meanwhile, so that no time-out of a step runs. The model, its gradients and the random numbers are
    left as they were.

    Args:
        backend: A running backend.
        replica: Of the model.
        forward: Returns a loss of the model that it is given; None where this rank has nothing to compute it from.

    Returns:
        Seconds that this rank took itself.

    Raises:
        ConfigError: The loss does not call the model, but its methods or parts, which are not compiled.
    """
    began = time.perf_counter()
    parts = [(name, part, part.forward) for name, part in replica.module.named_modules()]
    compiled = [(name, part, how) for name, part, how in parts if isinstance(how, CompiledForward)]
    if forward is not None:
        with left_as_it_was(replica.module):
            if replica.is_cut:
                with _one_by_one(backend, compiled):
                    forward(replica.module)
            else:
                _backward(forward(replica.module), list(replica.module.parameters()))
        if compiled and not any(how.called for _, _, how in compiled):
            raise ConfigError(
                f"--compile compiles what model(...) computes, and the loss never calls the {type(replica.module).__name__} itself, only "
                "methods or parts of it; let the loss call the model, or leave --compile out and compile those parts: "
                "model.encoder.compile()"
            )
    seconds = time.perf_counter() - began
    backend.agree_beside("the compilation of the model", "", timeout_s=max(LONGEST_S, backend.timeout_s))
    _log.info("compiled the model in %.1f s", seconds)
    return seconds


def _backward(output: Any, inputs: list[Any]) -> None:
    """Compute gradients, and keep none."""
    ends = [end for end in tree_leaves(output) if isinstance(end, Tensor) and end.requires_grad]
    begins = [begin for begin in inputs if isinstance(begin, Tensor) and begin.requires_grad]
    if ends and begins:
        torch.autograd.grad(ends, begins, [torch.zeros_like(end) for end in ends], allow_unused=True)


@contextmanager
def _one_by_one(backend: Backend, compiled: list[tuple[str, nn.Module, CompiledForward]]) -> Iterator[None]:
    """Let each part compile when it is first called, its parameters gathered, and wait for all ranks before any goes on."""

    def ahead(name: str, part: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        args, kwargs = tree_map(_detached, (args, kwargs))
        _backward(forward(*args, **kwargs), [*tree_leaves((args, kwargs)), *part.parameters()])
        backend.agree_beside(f"the compilation of {name!r}", "", timeout_s=max(LONGEST_S, backend.timeout_s))

    for name, part, how in compiled:
        how.before = partial(ahead, name, part)
    try:
        yield
    finally:
        for _, _, how in compiled:
            how.before = None


def _detached(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    leaf = value.detach().requires_grad_(value.requires_grad)
    return leaf if value.is_leaf else leaf.clone()  # a compiler tells leaves and others apart


def _inlined(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch.compile looks into, also where ``plain`` is the forward pass of one of torch's own modules."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    # torch counts how often it has compiled a piece of code, and gives up: each model has a piece of its own.
    forward.__code__ = forward.__code__.replace()
    return forward
