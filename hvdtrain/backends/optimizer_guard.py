"""What an optimizer must be, and must not do behind a replica's back. It replaces and wraps nothing of torch's optimizers.

A step on gradients that were never exchanged lets the ranks drift apart without a word, so a hook on the optimizer refuses
it; a closure runs backward inside `step`, after the exchange, and is refused as well, on every engine and on one process.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from hvdtrain.backends.units import is_cut
from hvdtrain.errors import ConfigError, TrainingError

__all__ = ["Guard", "check_optimizer", "check_parameters", "guard_steps"]


class Guard(Protocol):
    """Who decides about an optimizer's steps."""

    def why_no_step(self) -> str:
        """Say why a step must not be taken now; "" if it may."""
        ...

    def note_step(self) -> None:
        """A step has been taken."""
        ...


_guarded: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Guard]] = weakref.WeakKeyDictionary()


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse what is no optimizer, or one that exchanges cannot be fitted into.

    Raises:
        ConfigError: It lacks what optimizers have, or needs a closure.
    """
    lacking = [
        name for name in ("param_groups", "step", "state_dict", "load_state_dict") if not hasattr(optimizer, name)
    ]
    if lacking:
        raise ConfigError(
            f"{type(optimizer).__name__} cannot be used as an optimizer: it has no {', '.join(lacking)}; a wrapper must offer what "
            "torch.optim.Optimizer does, or hand its inner optimizer to replicate()"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{type(optimizer).__name__} needs a closure that it calls several times a step, and a replica exchanges gradients "
            "once a step; use an optimizer whose step() takes none, such as SGD or AdamW"
        )


def check_parameters(
    module: nn.Module, optimizer: Optimizer | None, trained: list[nn.Parameter], device: torch.device
) -> None:
    """Refuse parameters that cannot be trained on many ranks.

    Args:
        module: The model.
        optimizer: The user's; None for none.
        trained: Those of the model that require gradients.
        device: This rank's.

    Raises:
        ConfigError: Nothing to train, or parameters without a shape, on another device, of another model, or not meant to be
            the same on all ranks (their module has ``parameters_differ_between_ranks``).
    """
    for name, part in module.named_modules():
        if getattr(part, "parameters_differ_between_ranks", False):
            raise ConfigError(
                f"{name or 'the model'!r} is a {type(part).__name__}: each rank holds another part of it and needs the same batch, and a "
                "replica is equal on all ranks and has another batch on each. Train such a model without replicate() and without "
                "a Trainer: loss.backward() and optimizer.step() on every rank, with the same batch"
            )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(
                f"{name!r} has no shape yet: it belongs to a lazy module; run the model once on a sample batch, on every rank, before "
                "the optimizer is made and the model replicated"
            )
        if why := _why_not_copied(tensor):
            raise ConfigError(f"{name!r} {why} replicate() copies rank 0's numbers into it, in place")
    if not trained:
        raise ConfigError("the model has no parameter that requires grad: there is nothing to train")
    for name, parameter in module.named_parameters():
        if parameter.device.type != device.type or (device.index is not None and parameter.device != device):
            raise ConfigError(
                f"parameter {name!r} is on {parameter.device}, this rank's device is {device}; call model.to(backend.device) "
                "before you make the optimizer"
            )
    known = {id(p) for p in module.parameters()}
    for index, group in enumerate([] if optimizer is None else optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise ConfigError(
                    f"parameter group {index} of the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not the "
                    "model's, so its gradient would never be exchanged; put it into the model (a loss with parameters too), or "
                    "make the optimizer after the model has been moved or replaced"
                )


def _why_not_copied(tensor: torch.Tensor) -> str:
    """Why numbers cannot be written into a tensor, with the remedy; "" if they can."""
    if tensor.layout != torch.strided:
        return (
            f"has the layout {tensor.layout}; register it dense (.to_dense()), or keep it out of the model's buffers:"
        )
    if tensor.is_quantized:
        return "is a quantised tensor of torch's; register its int_repr() and its scales as buffers, and use these in forward():"
    if is_cut(tensor):
        return "is a DTensor, cut over ranks already; hand in the whole model and replicate(shard_modules=...):"
    if tensor.is_inference():
        return "was made under torch.inference_mode(); make the model outside it, or clone() the tensor there:"
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return "is expanded: several of its elements share one place in memory; register a .clone() of it:"
    return ""


def guard_steps(optimizer: Optimizer, guard: Guard) -> None:
    """Refuse steps of an optimizer that would make the ranks differ, and tell the guard of the others.

    Args:
        optimizer: The user's; of several guards the newest counts.
        guard: Held weakly.
    """
    new = optimizer not in _guarded
    _guarded[optimizer] = weakref.ref(guard)
    if not new:
        return
    if _runs_hooks(optimizer):
        optimizer.register_step_pre_hook(_check_step)
        optimizer.register_step_post_hook(_note_step)
        return
    plain = optimizer.step  # a wrapper that never called Optimizer.__init__, or is none: torch's hooks do not reach it

    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        _check_step(optimizer, args, kwargs)
        result = plain(*args, **kwargs)
        _note_step(optimizer, args, kwargs)
        return result

    optimizer.step = step  # type: ignore[method-assign]


def _runs_hooks(optimizer: Optimizer) -> bool:
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and bool(getattr(type(optimizer).step, "hooked", False))


def _check_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = args[1:] if args and args[0] is optimizer else args  # torch passes the optimizer as well
    if any(callable(value) for value in (*given, *kwargs.values())):
        raise TrainingError(
            "optimizer.step(closure): a closure would run backward after the gradients were exchanged; call "
            "replica.backward(loss, samples=...) and replica.step() instead"
        )
    guard = _guarded[optimizer]() if optimizer in _guarded else None
    problem = guard.why_no_step() if guard is not None else ""
    if problem:
        raise TrainingError(problem)


def _note_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    guard = _guarded[optimizer]() if optimizer in _guarded else None
    if guard is not None:
        guard.note_step()
