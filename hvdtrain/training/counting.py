"""What a batch counts: how many samples it has, and what its loss is a mean over, as far as the task says so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hvdtrain.errors import ConfigError

_REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True, slots=True)
class Share:
    """One micro-batch's part in a step.

    Attributes:
        samples: In it.
        weight: What its loss is multiplied by in the step's sum, before that is divided by the total.
        total: What the sum is divided by; None for the weights of all ranks, which are added up with the gradients.
    """

    samples: int
    weight: float
    total: float | None


class Counting:
    """Reads off a task how losses and metrics of batches are put together.

    Args:
        task: May have ``weight_of(batch)`` and ``loss_reduction`` (see `hvdtrain.training.task.Learning`).

    Raises:
        ConfigError: What it has cannot be.
    """

    def __init__(self, task: object) -> None:
        self._weight_of = getattr(task, "weight_of", None)
        reduction = getattr(task, "loss_reduction", "mean")
        if reduction not in _REDUCTIONS:
            raise ConfigError(f"{type(task).__name__}.loss_reduction must be 'mean' or 'sum', got {reduction!r}")
        if reduction == "sum" and self._weight_of is not None:
            raise ConfigError(
                f"{type(task).__name__} has weight_of(), what its loss is a mean over, and loss_reduction 'sum'; leave one of them out"
            )
        self._sums = reduction == "sum"

    def weight(self, batch: Any, samples: int) -> float:
        """Return what a batch's metrics, and its loss if that is a mean, are means over.

        Raises:
            ConfigError: The task's ``weight_of`` returned no number from 0.
        """
        if self._weight_of is None or not samples:
            return samples
        value = self._weight_of(batch)
        try:
            weight = float(value)
        except (
            TypeError,
            ValueError,
            RuntimeError,
        ):  # what float says of text, of objects and of tensors with dimensions
            what = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise ConfigError(
                f"the task's weight_of must return what the batch's loss is a mean over, a number; got {what}"
            ) from None
        if not 0 <= weight < math.inf:
            raise ConfigError(
                f"the task's weight_of must return what the batch's loss is a mean over, a number from 0; got {weight}"
            )
        return weight

    def share(self, batch: Any, samples: int, of_step: int | None) -> Share:
        """Return a micro-batch's part in its step.

        Args:
            batch: As the task's ``loss`` gets it.
            samples: In it.
            of_step: Samples of the whole step, over all ranks, if known.

        Raises:
            ConfigError: As `weight`.
        """
        if self._sums:
            return Share(samples, float(samples > 0), 1.0)
        return Share(samples, self.weight(batch, samples), of_step if self._weight_of is None else None)

    def mean(self, loss: Tensor, share: Share) -> tuple[Tensor, float]:
        """Return a loss for the log: a mean, and what it is the mean over."""
        return (loss.detach() / share.samples, share.samples) if self._sums else (loss, share.weight)
