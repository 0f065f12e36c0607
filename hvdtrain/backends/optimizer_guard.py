"""What an optimizer must be, and must not do behind a replica's back. It replaces and wraps nothing of the optimizer.

A step on gradients that were never exchanged lets the ranks drift apart without a word, so a hook on the optimizer refuses
it; a closure runs backward inside `step`, after the exchange, and is refused as well, on every engine and on one process.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hvdtrain.errors import ConfigError, TrainingError

__all__ = ["check_optimizer", "guard_steps"]

_guarded: weakref.WeakKeyDictionary[Optimizer, Callable[[], str]] = weakref.WeakKeyDictionary()


def check_optimizer(
    module: nn.Module, optimizer: Optimizer, parameters: list[nn.Parameter], device: torch.device
) -> None:
    """Refuse what cannot be trained on many ranks.

    Args:
        module: The model.
        optimizer: The user's.
        parameters: Those of the model that are trained.
        device: This rank's.

    Raises:
        ConfigError: Nothing to train, parameters on another device or of another model, or an optimizer that needs a
            closure.
    """
    if not parameters:
        raise ConfigError("the model has no parameter that requires grad: there is nothing to train")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{type(optimizer).__name__} needs a closure that it calls several times a step, and a replica exchanges gradients "
            "once a step; use an optimizer whose step() takes none, such as SGD or AdamW"
        )
    for name, parameter in module.named_parameters():
        if parameter.device.type != device.type or (device.index is not None and parameter.device != device):
            raise ConfigError(
                f"parameter {name!r} is on {parameter.device}, this rank's device is {device}; call model.to(backend.device) "
                "before you make the optimizer"
            )
    known = {id(p) for p in module.parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise ConfigError(
                    f"parameter group {index} of the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not the "
                    "model's, so its gradient would never be exchanged; put it into the model (a loss with parameters too), or "
                    "make the optimizer after the model has been moved or replaced"
                )


def guard_steps(optimizer: Optimizer, why_not: Callable[[], str]) -> None:
    """Refuse steps of an optimizer that would make the ranks differ.

    Args:
        optimizer: The user's; of several guards the newest counts.
        why_not: Says why a step must not be taken now; "" if it may. A bound method is held weakly.
    """
    new = optimizer not in _guarded
    reference = weakref.WeakMethod(why_not)
    _guarded[optimizer] = lambda: found() if (found := reference()) is not None else ""
    if new:
        optimizer.register_step_pre_hook(_check_step)


def _check_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = args[1:] if args and args[0] is optimizer else args  # torch passes the optimizer as well
    if any(callable(value) for value in (*given, *kwargs.values())):
        raise TrainingError(
            "optimizer.step(closure): a closure would run backward after the gradients were exchanged; call "
            "replica.backward(loss, samples=...) and replica.step() instead"
        )
    problem = _guarded[optimizer]() if optimizer in _guarded else ""
    if problem:
        raise TrainingError(problem)
