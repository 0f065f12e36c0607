"""Whether the parts that a configuration names fit together, tried on one sample and one number before training starts.

What does not fit would be found in the first step, as a traceback out of the middle of a model. Nothing is changed: the
model is in evaluation mode meanwhile, the optimizer that steps is one of its own, and random numbers are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hvdtrain.errors import ConfigError, HvdtrainError
from hvdtrain.settings.components import described
from hvdtrain.settings.wording import shown
from hvdtrain.training.random_numbers import random_state, set_random_state


def check_model(model: nn.Module, shape: Sequence[int], classes: int, *, name: str) -> None:
    """Try a model on one image of zeros.

    Args:
        model: Where it will be trained.
        shape: Of an image; nothing is tried where it is not known.
        classes: How many the data have; 0 where that is not known.
        name: As in ``--model``, for messages.

    Raises:
        ConfigError: It does not take such images, or does not give a number for each class.
    """
    if not shape or any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        return
    like = next(iter(model.parameters()), torch.zeros(()))
    image = torch.zeros((1, *shape), dtype=torch.float32, device=like.device)
    told = f"--model {name} does not fit --data, whose images are {' x '.join(map(str, shape))}"
    training = {module: module.training for module in model.modules()}
    before = random_state()
    try:
        model.eval()
        with torch.no_grad():
            output = model(image)
    except HvdtrainError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{told}: {described(error)}. Choose another model or other data, or give the model its arguments "
            f"(--model.ARG VALUE)"
        ) from error
    finally:
        for module, was in training.items():
            module.training = was
        set_random_state(before)
    if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != 1:
        what = (
            f"a tensor of {shown(tuple(output.shape))}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        )
        raise ConfigError(f"--model {name} makes {what} of one image; training by class needs a tensor (1, classes)")
    if output.shape[1] < classes:
        raise ConfigError(
            f"--model {name} makes {output.shape[1]} numbers of an image, and --data has {classes} classes; give the "
            "model an argument for their number, as in --model.classes or --model.num_classes"
        )


def check_optimizer(make: Callable[..., Any], lr: float, *, name: str, device: torch.device) -> None:
    """Try one step of torch's own optimizers, whose arguments are looked at only then.

    Args:
        make: Makes the optimizer, of parameters and ``lr``.
        lr: Learning rate.
        name: As in ``--optimizer``, for messages.
        device: Of the parameters.

    Raises:
        ConfigError: It cannot step.
    """
    number = nn.Parameter(torch.zeros(2, 2, device=device))
    number.grad = torch.zeros_like(number)
    optimizer = make([number], lr=lr)
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, torch.optim.LBFGS):  # refused elsewhere, by name
        return
    try:
        optimizer.step()
    except Exception as error:
        raise ConfigError(f"--optimizer {name} cannot step: {described(error)}") from error


def check_schedule(make: Callable[..., Any], *, name: str) -> None:
    """Try one step of torch's own schedulers, whose arguments are looked at only then.

    Args:
        make: Makes the schedule, of an optimizer.
        name: As in ``--schedule``, for messages.

    Raises:
        ConfigError: It cannot step.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    schedule = make(optimizer)
    if not isinstance(schedule, LRScheduler):
        return
    optimizer.step()
    try:
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.step(0.0)
        else:
            schedule.step()
    except Exception as error:
        raise ConfigError(f"--schedule {name} cannot step: {described(error)}") from error
