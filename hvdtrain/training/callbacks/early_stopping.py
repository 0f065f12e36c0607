"""Ending a run whose metric has stopped getting better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hvdtrain.errors import ConfigError
from hvdtrain.training.callbacks.goal import Goal
from hvdtrain.training.events import EvaluationEvent

if TYPE_CHECKING:
    from hvdtrain.training.trainer import Trainer


class EarlyStopping:
    """Ends the run when a metric has not become better in so many regular evaluations, one after the other.

    A run that ended so and is resumed ends again at once, unless it is given more patience.

    Args:
        metric: Its name in the evaluation's metrics.
        patience: Evaluations without anything better.
        mode: "min" or "max": what better is.
        min_delta: What is no more than this much better does not count.

    Raises:
        ConfigError: An argument cannot work.
    """

    def __init__(self, metric: str = "loss", *, patience: int = 3, mode: str = "min", min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ConfigError(f"patience must be at least 1, got {patience}")
        self._goal, self._patience = Goal(metric, mode, min_delta), patience
        self.best, self.waited = self._goal.worst, 0
        self.state_name = self._goal.of(self)

    def on_start(self, trainer: Trainer) -> None:
        """End what has been ended."""
        self._stop_if_due(trainer)

    def on_evaluation(self, trainer: Trainer, event: EvaluationEvent) -> None:
        """Compare."""
        value = self._goal.value(event.metrics)
        if not event.regular:
            return
        better = self._goal.improves(value, self.best)
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        self._stop_if_due(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, and for how many evaluations nothing was better."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.waited = state["best"], state["waited"]

    def _stop_if_due(self, trainer: Trainer) -> None:
        if self.waited >= self._patience:
            trainer.stop(f"{self._goal.metric} has not been better than {self.best:g} in {self.waited} evaluations")
