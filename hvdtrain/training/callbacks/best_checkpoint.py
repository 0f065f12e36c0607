"""Keeping the checkpoint of the best evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdtrain.training.callbacks.goal import Goal
from hvdtrain.training.checkpoint import Checkpoints, agree, opened
from hvdtrain.training.checkpoint_files import name_of
from hvdtrain.training.events import EvaluationEvent

if TYPE_CHECKING:
    from hvdtrain.training.trainer import Trainer


class BestCheckpoint:
    """Writes a checkpoint after each evaluation that is better than all before, into a folder of its own that keeps one.

    To go on from it: ``trainer.fit(..., resume_from=best.checkpoints.find(backend))``, with this callback or without.

    Args:
        folder: Not that of the run's other checkpoints, which thin out by age.
        metric: Its name in the evaluation's metrics.
        mode: "min" or "max": what better is.

    Attributes:
        checkpoints: The folder's.

    Raises:
        ConfigError: An argument cannot work.
    """

    def __init__(self, folder: Path | str, metric: str = "loss", *, mode: str = "min") -> None:
        self.checkpoints = Checkpoints(Path(folder).absolute(), keep=1)
        self._goal = Goal(metric, mode)
        self.best, self._step = self._goal.worst, -1
        self.state_name = self._goal.of(self)

    def on_start(self, trainer: Trainer) -> None:
        """Have the folder alone, with the best of this run in it and of no other: one that is gone is to be found anew."""
        trainer.keep_apart(self.checkpoints)
        if not agree(trainer.backend, self._begin):
            self.best, self._step = self._goal.worst, -1

    def on_evaluation(self, trainer: Trainer, event: EvaluationEvent) -> None:
        """Save, if it is the best."""
        value = self._goal.value(event.metrics)
        if self._goal.improves(value, self.best):
            before = None if self._step < 0 else str(self.checkpoints.folder / name_of(self._step))
            self.best, self._step = value, event.step
            trainer.save(self.checkpoints, last=before)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, and the step of its checkpoint."""
        return {"best": self.best, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self._step = state["best"], state["step"]

    def _begin(self) -> bool:
        """On rank 0: set aside what other runs wrote after this one's best, and say whether that is there."""
        path = self.checkpoints.folder / name_of(max(0, self._step))
        best = opened(path) if self._step >= 0 and path.is_dir() else None
        self.checkpoints.begin(best)
        return best is not None
