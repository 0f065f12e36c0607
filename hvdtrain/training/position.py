"""Where the loop is, counted in samples so that it means the same at every world size, and the losses on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from hvdtrain.errors import ConfigError, NonFiniteLoss
from hvdtrain.training.checkup import Tally


@dataclass(slots=True)
class Position:
    """How far training has come.

    Attributes:
        epoch: Epochs completed.
        samples: Samples of the current epoch that are done, over all ranks.
        cut: How the data is cut over the ranks, which says what samples these are (`RankBatches.cut`).
        steps: Optimizer steps done, skipped ones included.
        skipped_steps: Steps without an update.
        train_loss: Mean loss over the last epoch, over all ranks; NaN before the first ends.
        eval_metrics: Of the last evaluation.
        evaluated_at: Optimizer steps done at the last evaluation; -1 before the first.
        epoch_tally: This rank's losses in the current epoch.
    """

    epoch: int = 0
    samples: int = 0
    cut: str = "batch"
    steps: int = 0
    skipped_steps: int = 0
    train_loss: float = math.nan
    eval_metrics: dict[str, float] = field(default_factory=dict)
    evaluated_at: int = -1
    epoch_tally: Tally = field(default_factory=Tally)
    _recent: Tally = field(default_factory=Tally)

    def count(self, loss: float, weight: float) -> None:
        """Count a micro-batch's loss, a mean over ``weight``."""
        self.epoch_tally.add(loss, weight)
        self._recent.add(loss, weight)

    def take_recent(self) -> Tally:
        """Return this rank's losses since the last call."""
        recent, self._recent = self._recent, Tally()
        return recent

    def has_ended(self, epochs: int, max_steps: float, is_over: Callable[[int], bool]) -> bool:
        """Whether so many epochs or steps are done. All samples of an epoch may be done before the epoch is.

        Args:
            epochs: Of the run.
            max_steps: Of the run.
            is_over: Whether an epoch has no samples left after so many; every rank calls it.
        """
        return self.epoch >= epochs or (self.steps >= max_steps and not is_over(self.samples))

    def advance(self, samples: int) -> None:
        """One global batch is done."""
        self.samples += samples
        self.steps += 1

    def finish_epoch(self) -> None:
        """The epoch is done: the next begins at its first sample."""
        self.epoch += 1
        self.samples = 0
        self.epoch_tally = Tally()

    def state_dict(self) -> dict[str, Any]:
        """Return what is the same on every rank."""
        state = asdict(self)
        del state["epoch_tally"], state["_recent"]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; this rank's part of the epoch's tally is its own to set."""
        for name in self.state_dict():
            setattr(self, name, state.get(name, getattr(self, name)))
        self.epoch_tally, self._recent = Tally(), Tally()


class PendingLoss:
    """The loss of the last micro-batch, which on a GPU is looked at one micro-batch later, when it is there anyway.

    Args:
        position: Where losses are counted.
        rank: This rank, for messages.
        skip_nonfinite: Leave NaN and infinity out, instead of raising.
    """

    def __init__(self, position: Position, *, rank: int, skip_nonfinite: bool) -> None:
        self._position = position
        self._rank = rank
        self._skip_nonfinite = skip_nonfinite
        self._pending: tuple[int, int, Tensor, float] | None = None  # step, epoch, loss, weight

    def note(self, loss: Tensor, weight: float) -> None:
        """Count a micro-batch's loss, a mean over ``weight``.

        Raises:
            NonFiniteLoss: It is not finite, or the one before was not.
        """
        self.look()
        self._pending = (self._position.steps, self._position.epoch, loss.detach(), weight)
        if loss.device.type == "cpu":
            self.look()

    def look(self) -> None:
        """Count what has not been looked at; raises as `note` does."""
        if self._pending is None:
            return
        step, epoch, loss, weight = self._pending
        self._pending = None
        value = float(loss)
        if math.isfinite(value):
            self._position.count(value, weight)
        elif not self._skip_nonfinite:
            raise NonFiniteLoss(
                f"the loss is {value} at step {step + 1} (epoch {epoch + 1}) on rank {self._rank}. Lower --lr, "
                "clip with --clip-norm, look for broken samples, or go on without such steps with --on-nan skip"
            )


def check_loss(loss: object) -> None:
    """Refuse what is no loss to minimise, before it goes any further.

    Raises:
        ConfigError: It is not one real number in a tensor.
    """
    if not isinstance(loss, Tensor):
        raise ConfigError(
            f"the task's loss must be a tensor, the mean over the batch's samples; got a {type(loss).__name__}"
        )
    if loss.numel() != 1:
        raise ConfigError(
            f"the loss must be a scalar, the mean over the batch's samples; got shape {tuple(loss.shape)}"
        )
    if not loss.is_floating_point():
        raise ConfigError(f"the loss must be a real number, the mean over the batch's samples; got {loss.dtype}")
