"""Metrics over a whole data set that are no means over samples, the same on every rank, or the same refusal on every rank.

A task names them in ``epoch_metrics`` and updates them in `metrics`. Here they begin anew before each evaluation; afterwards
what the ranks gathered goes to one of them, which computes for all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from hvdtrain.backends.communicator import Communicator
from hvdtrain.errors import ConfigError
from hvdtrain.training.metric_state import (
    EpochMetric,
    grouping_of,
    merge,
    objects_of,
    prepare,
    state_of,
    was_updated,
    why_not,
)
from hvdtrain.training.metric_value import scalar

_log = logging.getLogger(__name__)

_REMEDY = "choose an average=, wrap it (torchmetrics.wrappers.ClasswiseWrapper), or compute one number of it"


class EpochMetrics:
    """The metrics of one evaluation.

    Args:
        task: Its ``epoch_metrics``, if it has them, are computed.
        device: Of the batches.

    Raises:
        ConfigError: The task's ``epoch_metrics`` cannot be computed over ranks.
    """

    def __init__(self, task: object, device: torch.device) -> None:
        self._metrics = epoch_metrics_of(task)
        for metric in self._metrics.values():
            prepare(metric, device)

    def compute(self, communicator: Communicator, means: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics over all ranks' samples; every rank must call it.

        Args:
            communicator: All ranks.
            means: What else the evaluation reports: its names are taken.

        Raises:
            ConfigError: On every rank: one of them was never updated, or gives no number.
        """
        if not self._metrics:
            return {}
        try:
            by = self._agreed_rank(communicator)
            states = {name: state_of(metric) for name, metric in self._metrics.items()}
            everyone = communicator.gather_object(states, by)
            problem, found, cause = "", {}, None
            if everyone is not None:
                try:
                    found = self._found(everyone, by, means)
                except ConfigError as error:
                    problem = str(error)
                except Exception as error:  # of a metric's own
                    problem, cause = f"{type(error).__name__} in the task's epoch_metrics: {error}", error
            problem, found = communicator.broadcast_object((problem, found), by)
        finally:
            for metric in self._metrics.values():  # what they hold may be large
                metric.reset()
        if problem:
            raise ConfigError(problem) from cause
        return found

    def _agreed_rank(self, communicator: Communicator) -> int:
        """The rank that computes: the first that has seen a sample."""
        mine = {name: (was_updated(metric), grouping_of(metric)) for name, metric in self._metrics.items()}
        everyone = communicator.all_gather_object(mine)
        for name in self._metrics:
            groupings = {theirs[name] for theirs in everyone if theirs[name][0]}
            if not groupings:
                raise ConfigError(
                    f"epoch metric {name!r} was never updated; call its update(...) in the task's metrics(model, batch)"
                )
            if len(groupings) > 1:
                raise ConfigError(
                    f"the collection {name!r} shares states between its metrics otherwise on some ranks, because their first batches "
                    "differ; make it with compute_groups=False, or name the groups"
                )
        return next(rank for rank, theirs in enumerate(everyone) if any(updated for updated, _ in theirs.values()))

    def _found(self, everyone: list[dict[str, Any]], mine: int, means: Mapping[str, float]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, metric in self._metrics.items():
            merge(metric, [states[name] for states in everyone], mine)
            numbers = numbers_of(name, metric.compute())
            for key in numbers:
                if key in means or key in found:
                    raise ConfigError(f"two metrics are called {key!r}; rename one of them in epoch_metrics")
            found |= numbers
        return found


def epoch_metrics_of(task: object) -> dict[str, EpochMetric]:
    """Return a task's metrics over the whole data set, by name; those of a collection given alone keep their own names.

    Raises:
        ConfigError: They are no metrics that can be computed over ranks, or one takes part twice.
    """
    given = getattr(task, "epoch_metrics", None)
    if given is None:
        return {}
    if isinstance(given, EpochMetric):
        given = {"": given}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"epoch_metrics must be a dictionary of metrics by name, got a {type(given).__name__}")
    seen: dict[int, str] = {}
    for name, metric in given.items():
        why = why_not(metric)
        if why:
            raise ConfigError(f"epoch metric {name!r} cannot be computed over ranks: {why}")
        for part in objects_of(metric):
            if id(part) in seen:
                raise ConfigError(
                    f"epoch metrics {seen[id(part)]!r} and {name!r} hold the same {type(part).__name__}, which would count every "
                    "batch twice; make one for each name"
                )
            seen[id(part)] = name
    return dict(given)


def described(task: object) -> dict[str, str]:
    """A task's metrics over the whole data set, for comparing over the ranks."""
    return {name: type(metric).__name__ for name, metric in epoch_metrics_of(task).items()}


def numbers_of(name: str, value: object) -> dict[str, float]:
    """Return what a metric computed as numbers by name: ``name``, or ``name/key`` for each number of a dictionary.

    Raises:
        ConfigError: There is no number in it.
    """
    if not isinstance(value, Mapping):
        number = scalar(value)
        if isinstance(number, str):
            raise ConfigError(
                f"epoch metric {name!r} {number}, and must give a number or a dictionary of numbers; {_REMEDY}"
            )
        return {name or "metric": float(number)}
    found, left_out = {}, []
    for key, item in value.items():
        number = scalar(item)
        if isinstance(number, str):
            left_out.append(f"{key!r} {number}")
        else:
            found[f"{name}/{key}" if name else str(key)] = float(number)
    if not found:
        raise ConfigError(
            f"epoch metric {name!r} gives no number ({', '.join(left_out) or 'its dictionary is empty'}); {_REMEDY}"
        )
    if left_out:
        _log.info("epoch metric %r: only numbers are reported, not: %s", name, ", ".join(left_out))
    return found
