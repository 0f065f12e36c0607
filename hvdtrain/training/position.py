"""Where the loop is, counted in samples so that it means the same at every world size."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from hvdtrain.training.checkup import Tally


@dataclass(slots=True)
class Position:
    """How far training has come.

    Attributes:
        epoch: Epochs completed.
        samples: Samples of the current epoch that are done, over all ranks.
        steps: Optimizer steps done, skipped ones included.
        skipped_steps: Steps without an update.
        train_loss: Mean loss over the last epoch, over all ranks; NaN before the first ends.
        eval_metrics: Of the last evaluation.
        epoch_tally: This rank's losses in the current epoch.
    """

    epoch: int = 0
    samples: int = 0
    steps: int = 0
    skipped_steps: int = 0
    train_loss: float = math.nan
    eval_metrics: dict[str, float] = field(default_factory=dict)
    epoch_tally: Tally = field(default_factory=Tally)
    _recent: Tally = field(default_factory=Tally)

    def count(self, loss: float, samples: int) -> None:
        """Count a micro-batch's mean loss."""
        self.epoch_tally.add(loss, samples)
        self._recent.add(loss, samples)

    def take_recent(self) -> Tally:
        """Return this rank's losses since the last call."""
        recent, self._recent = self._recent, Tally()
        return recent

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

    def load_state_dict(self, state: dict[str, Any], tally: Tally) -> None:
        """Continue from `state_dict` and this rank's part of the epoch's tally."""
        for name, value in state.items():
            setattr(self, name, value)
        self.epoch_tally, self._recent = tally, Tally()
