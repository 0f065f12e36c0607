"""When a learning-rate schedule is stepped, and with what; and that it can be saved.

Any torch scheduler serves, alone, nested in another one, or a class of the user's own with the same methods. One that needs
a metric (`ReduceLROnPlateau`) is stepped by evaluations, every other one by optimizer steps or by epochs.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, SequentialLR

from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.training.plain_state import is_stateful, to_plain

_log = logging.getLogger(__name__)

_METRICS = ("metrics", "metric", "loss", "val_loss", "eval_loss")


class Pacemaker:
    """Steps one schedule, or none.

    Args:
        schedule: A torch scheduler, or an object with its `step`; None for a constant learning rate.
        interval: "step" or "epoch": what steps a schedule that needs no metric.
        metric: Of an evaluation: what steps a schedule that needs one.

    Attributes:
        needs_evaluation: Whether the schedule is stepped by evaluations, with their metric.

    Raises:
        ConfigError: It would not be stepped right: it wants an argument that this loop does not have, or holds a
            ReduceLROnPlateau, whose loss the schedule around it does not pass on.
    """

    def __init__(self, schedule: Any, interval: str, metric: str = "loss") -> None:
        if interval not in ("step", "epoch"):
            raise ConfigError(f"schedule_interval must be 'step' or 'epoch', got {interval!r}")
        self.schedule = schedule
        self._interval, self._metric = interval, metric
        self.needs_evaluation = schedule is not None and _needs_metric(schedule)
        if isinstance(schedule, ReduceLROnPlateau):
            _warn_if_idle(schedule)
        for outer, inner in _inside(schedule):
            if isinstance(inner, ReduceLROnPlateau):
                raise ConfigError(
                    f"the schedule {type(schedule).__name__} holds a ReduceLROnPlateau, to which it cannot pass the loss of an "
                    "evaluation; give the ReduceLROnPlateau alone, or use another schedule inside"
                )
            # At a milestone torch asks the next schedule for its learning rates, which those that only hold others have not.
            if (
                isinstance(outer, SequentialLR)
                and inner is not outer._schedulers[0]
                and type(inner).get_lr is LRScheduler.get_lr
            ):
                raise ConfigError(
                    f"torch's SequentialLR cannot go on to a {type(inner).__name__}, and fails at its milestone; let it be the "
                    "first, or go on to the schedules inside it one by one"
                )

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse a schedule that changes nothing that is trained with.

        Args:
            optimizer: The one that is stepped. A schedule may be made over one inside it, whose groups it shares.

        Raises:
            ConfigError: The schedule is over another optimizer's parameter groups.
        """
        groups = {id(group) for group in optimizer.param_groups}
        for schedule in (self.schedule, *(inner for _, inner in _inside(self.schedule))):
            scheduled = getattr(getattr(schedule, "optimizer", None), "param_groups", None)
            if scheduled and not any(id(group) in groups for group in scheduled):
                raise ConfigError(
                    f"the schedule {type(schedule).__name__} is over another optimizer than the one that is trained with, whose learning rate "
                    "it would never change; make it over that one"
                )

    def check_savable(self, optimizer: Optimizer) -> None:
        """Refuse at once what the first checkpoint would fail at.

        Raises:
            ConfigError: The schedule's state cannot be saved.
        """
        if self.schedule is None:
            return
        name = type(self.schedule).__name__
        if not is_stateful(self.schedule):
            raise ConfigError(
                f"the schedule {name} cannot be saved in checkpoints: give it state_dict and load_state_dict, or train "
                "without checkpoints"
            )
        try:
            to_plain(self.schedule.state_dict(), f"the schedule {name}", kept=(optimizer, self.schedule))
        except (CheckpointError, AttributeError) as error:  # torch looks into callables for what to save
            raise ConfigError(f"{error}; or train without checkpoints") from error

    def check_evaluated(self, evaluated: bool) -> None:
        """Refuse a schedule that nothing would ever step.

        Raises:
            ConfigError: It needs evaluations, and there are none.
        """
        if self.needs_evaluation and not evaluated:
            raise ConfigError(
                f"{type(self.schedule).__name__} is stepped with the loss of each evaluation, and fit was given no evaluation "
                "data, so it would never be stepped; give eval_data, or another schedule"
            )

    def after_step(self) -> None:
        """An optimizer step has been made."""
        if self.schedule is not None and self._interval == "step" and not self.needs_evaluation:
            self.schedule.step()

    def after_epoch(self) -> None:
        """An epoch has been completed."""
        if self.schedule is not None and self._interval == "epoch" and not self.needs_evaluation:
            self.schedule.step()

    def after_evaluation(self, metrics: Mapping[str, float]) -> None:
        """One of the run's regular evaluations has been made.

        Raises:
            ConfigError: It does not report the schedule's metric.
        """
        if self.needs_evaluation:
            if self._metric not in metrics:
                raise ConfigError(
                    f"schedule_metric is {self._metric!r}, and the evaluation reports {', '.join(metrics)}; name one of these"
                )
            self.schedule.step(metrics[self._metric])


def describe(schedule: Any) -> str:
    """A schedule's classes, inner ones in brackets: what a resumed run must have again."""
    inner = [describe(one) for one in getattr(schedule, "_schedulers", ())]
    return type(schedule).__name__ + (f"({', '.join(inner)})" if inner else "")


def _inside(schedule: Any) -> Iterator[tuple[Any, Any]]:
    """The schedules that others hold and step (torch's SequentialLR and ChainedScheduler), at any depth, each with its holder."""
    for inner in getattr(schedule, "_schedulers", ()):
        yield schedule, inner
        yield from _inside(inner)


def _warn_if_idle(schedule: ReduceLROnPlateau) -> None:
    """torch leaves a learning rate alone that would be lowered by no more than ``eps``."""
    rates = [float(group["lr"]) for group in schedule.optimizer.param_groups]
    if all(rate * (1 - schedule.factor) <= schedule.eps for rate in rates):
        _log.warning(
            "ReduceLROnPlateau will never change the learning rate %g: it leaves out changes of no more than its eps=%g; give it "
            "a smaller eps",
            max(rates),
            schedule.eps,
        )


def _needs_metric(schedule: Any) -> bool:
    if isinstance(schedule, ReduceLROnPlateau):
        return True
    if not callable(getattr(schedule, "step", None)):
        raise ConfigError(f"a schedule needs a method step(), and {type(schedule).__name__} has none")
    needed = [
        parameter.name
        for parameter in inspect.signature(schedule.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if not needed:
        return False
    if len(needed) == 1 and needed[0] in _METRICS:
        return True
    raise ConfigError(
        f"{type(schedule).__name__}.step needs {', '.join(needed)}, which this loop does not give: it calls step(), or "
        f"step(loss) after an evaluation where the argument is called {' or '.join(_METRICS[:2])}"
    )
