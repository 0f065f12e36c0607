"""Metrics over a data set, each sample once, the same on every rank, or the same refusal on every rank.

What a task's `metrics` returns for a batch is a mean over that batch's samples, or over what the task's ``weight_of`` says;
here it is weighted by that. A metric that is no such mean (an area under a curve, an F-score) belongs into its ``epoch_metrics``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hvdtrain.backends.base import Backend
from hvdtrain.backends.replica import Replica
from hvdtrain.data.sample_count import SampleCount
from hvdtrain.errors import ConfigError
from hvdtrain.training.counting import Counting
from hvdtrain.training.epoch_metrics import EpochMetrics
from hvdtrain.training.inference import inference
from hvdtrain.training.lone_sample import batches_without_samples_explained
from hvdtrain.training.metric_value import scalar
from hvdtrain.training.precision import Precision
from hvdtrain.training.task import Learning


class MetricSums:
    """This rank's metrics so far, each summed over what it is a mean over.

    Attributes:
        problem: What was wrong with the first metrics that cannot be summed; "" as long as nothing was.
    """

    def __init__(self, device: torch.device) -> None:
        self.problem = ""
        self._names: list[str] | None = None  # of the first batch; None without samples
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def add(self, metrics: object, weight: float) -> None:
        """Count what a task returned for a batch, or note why it cannot be counted."""
        self.problem = self.problem or self._add(metrics, weight)

    def means(self, backend: Backend) -> dict[str, float]:
        """Return the means over all ranks; every rank must call it.

        Raises:
            ConfigError: On every rank: metrics of some rank cannot be summed, ranks have different ones, or nothing had a
                weight.
        """
        everyone: list[tuple[str, list[str] | None]] = backend.all_gather_object((self.problem, self._names))
        for rank, (problem, _) in enumerate(everyone):
            if problem:
                raise ConfigError(f"{problem} (on rank {rank})")
        # A rank without samples knows no names, and adds zeros.
        known = [(rank, theirs) for rank, (_, theirs) in enumerate(everyone) if theirs is not None]
        first, names = known[0] if known else (0, [])
        for rank, theirs in known:
            if theirs != names:
                raise ConfigError(
                    f"the ranks report different metrics: rank {first} {', '.join(names)}; rank {rank} {', '.join(theirs)}. The task's "
                    "metrics must have the same names for every batch"
                )
        mine = [of.get(name, self._zero) for of in (self._sums, self._weights) for name in names]
        totals = backend.all_reduce(torch.stack(mine)).tolist() if mine else []
        sums, weights = totals[: len(names)], totals[len(names) :]
        wrong = [name for name, weight in zip(names, weights, strict=True) if not 0 <= weight < math.inf]
        if wrong:
            raise ConfigError(
                f"the weight of metric {', '.join(wrong)} is negative, NaN or infinite for some batch, so that it has no mean; return "
                "(mean, weight) with a weight from 0"
            )
        weightless = [name for name, weight in zip(names, weights, strict=True) if not weight]
        if weightless:
            raise ConfigError(
                f"the weight of metric {', '.join(weightless)} is 0 for every batch of the data, so that it has no mean"
            )
        return {name: total / weight for name, total, weight in zip(names, sums, weights, strict=True)}

    def _add(self, metrics: object, weight: float) -> str:
        if not isinstance(metrics, Mapping):
            return (
                f"the task's metrics must return a dictionary of means over the batch's samples, and returned a "
                f"{type(metrics).__name__}"
            )
        names = sorted(map(str, metrics))
        if self._names is None:
            if "loss" not in metrics:
                return f"the task's metrics lack 'loss', the mean loss over the batch's samples; they are: {', '.join(names) or 'none'}"
            self._names = names
        if names != self._names:
            differing = sorted(set(names) ^ set(self._names))
            return f"the task's metrics must have the same names for every batch; {', '.join(differing)} came with only some"
        for name, value in metrics.items():
            problem = self._count(
                str(name), *(value if isinstance(value, tuple) and len(value) == 2 else (value, weight))
            )
            if problem:
                return f"metric {name!r} {problem}"
        return ""

    def _count(self, name: str, value: object, weight: object) -> str:
        number, over = scalar(value), scalar(weight)
        if isinstance(number, str):
            return f"{number}; return a mean over samples, a number or a tensor without dimensions"
        if isinstance(over, str):
            return f"has a weight that {over}; return (mean, weight), two numbers or tensors without dimensions"
        number, over = (x.to(self._zero.device, torch.float64) for x in (number, over))
        # A mean over nothing is NaN, and counts nothing.
        self._sums[name] = self._sums.get(name, self._zero) + torch.where(over == 0, 0.0, number * over)
        self._weights[name] = self._weights.get(name, self._zero) + torch.where(over < 0, math.nan, over)
        return ""


def evaluate(
    backend: Backend,
    replica: Replica,
    task: Learning,
    precision: Precision,
    batches: Iterable[tuple[Any, int]],
    counting: Counting,
    seen: SampleCount | None = None,
) -> dict[str, float]:
    """Compute a task's metrics; every rank must call it.

    Args:
        backend: A running backend.
        replica: Its inference model is evaluated, in evaluation mode, with rank 0's buffers.
        task: Its `metrics` and, if it has them, its ``epoch_metrics`` are computed.
        precision: Of the forward pass.
        batches: This rank's share of the data: each batch, on the device, with the number of indices that it was made of; none
            only so that ranks keep in step.
        counting: Says what the metrics of a batch are means over.
        seen: Counts the samples that a batch has.

    Raises:
        ConfigError: On every rank: the metrics of some rank's batch cannot be averaged over the samples.
    """
    sums, whole = MetricSums(backend.device), EpochMetrics(task, backend.device)
    with inference(replica) as model:
        for loaded, indices in batches:
            batch, weight = precision.cast(loaded), 0.0
            try:
                weight = counting.weight(batch, counting.samples(batch, indices, seen))
            except ConfigError as error:
                sums.problem = sums.problem or str(error)
            if not sums.problem or replica.is_cut:
                with precision.autocast(), batches_without_samples_explained(indices):
                    metrics = task.metrics(model, batch)
                if indices:
                    sums.add(metrics, weight)
            if sums.problem and not replica.is_cut:  # else the others need this rank in each forward pass
                break
    means = sums.means(backend)
    return means | whole.compute(backend, means)
