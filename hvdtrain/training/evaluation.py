"""Mean metrics over a data set, each sample once, the same on every rank, or the same refusal on every rank.

What a task's `metrics` returns for a batch is a mean over that batch's samples; here it is weighted by their number. A metric
that is no such mean (an area under a curve, an F-score) belongs into the task's ``epoch_metrics``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hvdtrain.backends.base import Backend
from hvdtrain.backends.replica import Replica
from hvdtrain.errors import ConfigError
from hvdtrain.training.epoch_metrics import EpochMetrics
from hvdtrain.training.inference import inference
from hvdtrain.training.metric_value import scalar
from hvdtrain.training.precision import Precision
from hvdtrain.training.task import Learning


class MetricSums:
    """This rank's metrics so far, each summed over samples.

    Attributes:
        problem: What was wrong with the first metrics that cannot be summed; "" as long as nothing was.
    """

    def __init__(self, device: torch.device) -> None:
        self.problem = ""
        self._device = device
        self._names: list[str] | None = None  # of the first batch; None without samples
        self._samples = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: object, samples: int) -> None:
        """Count what a task returned for a batch, or note why it cannot be counted."""
        self.problem = self.problem or self._add(metrics, samples)

    def means(self, backend: Backend) -> dict[str, float]:
        """Return the means over the samples of all ranks; every rank must call it.

        Raises:
            ConfigError: On every rank: metrics of some rank cannot be summed, or ranks have different ones.
        """
        everyone: list[tuple[str, list[str] | None]] = backend.all_gather_object((self.problem, self._names))
        for rank, (problem, _) in enumerate(everyone):
            if problem:
                raise ConfigError(f"{problem} (on rank {rank})")
        # Rank 0 has a sample if anybody has, so it knows the names; a rank without samples adds zeros.
        names = everyone[0][1] or []
        for rank, (_, theirs) in enumerate(everyone):
            if theirs is not None and theirs != names:
                raise ConfigError(
                    f"the ranks report different metrics: rank 0 {', '.join(names)}; rank {rank} {', '.join(theirs)}. The task's "
                    "metrics must have the same names for every batch"
                )
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        sums = [self._sums.get(name, zero) for name in names]
        samples, *totals = backend.all_reduce(torch.stack([zero + self._samples, *sums])).tolist()
        return {name: total / samples for name, total in zip(names, totals, strict=True)}

    def _add(self, metrics: object, samples: int) -> str:
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
        self._samples += samples
        for name, value in metrics.items():
            number = scalar(value)
            if isinstance(number, str):
                return f"metric {name!r} {number}; return a mean over samples, a number or a tensor without dimensions"
            sum_so_far = self._sums.get(str(name), torch.zeros((), dtype=torch.float64, device=self._device))
            self._sums[str(name)] = sum_so_far + number.to(self._device, torch.float64) * samples
        return ""


def evaluate(
    backend: Backend,
    replica: Replica,
    task: Learning,
    precision: Precision,
    batches: Iterable[tuple[Any, int]],
) -> dict[str, float]:
    """Compute a task's metrics; every rank must call it.

    Args:
        backend: A running backend.
        replica: Its inference model is evaluated, in evaluation mode, with rank 0's buffers.
        task: Its `metrics` and, if it has them, its `epoch_metrics` are computed.
        precision: Of the forward pass.
        batches: This rank's share of the data: each batch, on the device, with the number of its samples.

    Raises:
        ConfigError: On every rank: the metrics of some rank's batch cannot be averaged over the samples.
    """
    sums, whole = MetricSums(backend.device), EpochMetrics(task, backend.device)
    with inference(replica) as model:
        for loaded, samples in batches:
            with precision.autocast():
                sums.add(task.metrics(model, precision.cast(loaded)), samples)
            if sums.problem:
                break
    means = sums.means(backend)
    return means | whole.compute(backend, means)
