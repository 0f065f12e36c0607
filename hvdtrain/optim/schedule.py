"""Learning rates over the steps of a run: linear warm-up, then constant, cosine, linear or step decay.

Linear scaling by the number of ranks and gradual warm-up are those of Goyal et al. 2017, "Accurate, Large Minibatch SGD:
Training ImageNet in 1 Hour", https://arxiv.org/abs/1706.02677, sections 2.1 and 2.2.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hvdtrain.errors import ConfigError
from hvdtrain.settings.wording import shown

_MOST = 1e9  # epochs, or a factor: finite numbers only


def scaled_lr(lr: float, world_size: int) -> float:
    """The learning rate for a global batch that grew ``world_size``-fold: ``lr * world_size``."""
    return lr * world_size


class BuiltInSchedule(LambdaLR):
    """A factor on each parameter group's own rate. What is saved of it is the step; rates and shape are the running program's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved step, with the rates that this schedule was made with."""
        base_lrs = list(self.base_lrs)
        super().load_state_dict(state_dict)
        self.base_lrs = base_lrs
        rates = [base * factor(self.last_epoch) for base, factor in zip(base_lrs, self.lr_lambdas, strict=True)]
        for group, base, rate in zip(self.optimizer.param_groups, base_lrs, rates, strict=True):
            group["initial_lr"] = base
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = list(rates)


def make_schedule(
    optimizer: Optimizer,
    name: str,
    args: Mapping[str, Any],
    *,
    total_steps: int,
    steps_per_epoch: int,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
) -> BuiltInSchedule:
    """Make a schedule that is stepped once per optimizer step; every parameter group keeps its own base rate.

    Args:
        optimizer: Its groups' current ``lr`` are the peaks.
        name: "constant", "cosine" (to ``final``, a fraction of the peak, default 0), "linear" (likewise) or "step"
            (times ``gamma``, default 0.1, every ``every`` epochs, default 30).
        args: The arguments just named.
        total_steps: Optimizer steps of the whole run.
        steps_per_epoch: For "step".
        warmup_steps: Steps over which the rate rises linearly to the peak.
        warmup_start: Fraction of the peak at which warm-up begins: 1 / world size under linear scaling, so that it
            begins at the unscaled rate.

    Raises:
        ConfigError: Unknown name or argument.
    """
    makers: dict[str, Callable[..., Callable[[int], float]]] = {
        "constant": _constant,
        "cosine": _cosine,
        "linear": _linear,
        "step": _step_decay,
    }
    if name not in makers:
        raise ConfigError(
            f"unknown schedule {name!r}; use one of {', '.join(makers)}, or the import path of a torch scheduler"
        )
    known = [*inspect.signature(makers[name]).parameters][2:]
    for argument, value in args.items():
        if argument not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes no arguments"
            raise ConfigError(f"--schedule {name}: there is no argument {argument!r}; {takes}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
            raise ConfigError(f"--schedule.{argument} must be a number from 0 to {_MOST:g}, got {shown(value)}")
    shape = makers[name](max(1, total_steps - warmup_steps), steps_per_epoch, **args)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return warmup_start + (1 - warmup_start) * (step + 1) / warmup_steps
        return shape(step - warmup_steps)

    return BuiltInSchedule(optimizer, factor)


def _constant(steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    return lambda step: 1.0


def _cosine(steps: int, steps_per_epoch: int, *, final: float = 0.0) -> Callable[[int], float]:
    return lambda step: final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def _linear(steps: int, steps_per_epoch: int, *, final: float = 0.0) -> Callable[[int], float]:
    return lambda step: final + (1 - final) * (1 - min(1.0, step / steps))


def _step_decay(steps: int, steps_per_epoch: int, *, every: float = 30, gamma: float = 0.1) -> Callable[[int], float]:
    return lambda step: float(gamma ** (step // max(1, round(every * steps_per_epoch))))
