"""An average of the weights over the steps, which often does better than the last weights do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.training.callbacks.weights import swap, weights_of
from hvdtrain.training.events import StepEvent

if TYPE_CHECKING:
    from hvdtrain.training.trainer import Trainer


class ExponentialMovingAverage:
    """Averages parameters and floating-point buffers: after each step ``average = decay * average + (1 - decay) * weights``.

    Args:
        decay: Between 0 and 1; the average reaches back about ``1 / (1 - decay)`` steps.
        evaluate: Whether evaluations and predictions use the average. Checkpoints hold both; ``with average.applied(trainer):``
            the model holds the average, to export it.

    Raises:
        ConfigError: ``decay`` is out of bounds.
    """

    def __init__(self, decay: float = 0.999, *, evaluate: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"decay must be 0 or more and less than 1, got {decay}")
        self._update = get_ema_multi_avg_fn(decay)
        self._evaluate = evaluate
        self._average: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # the model's own

    def on_start(self, trainer: Trainer) -> None:
        """Begin with the weights as they are, or go on."""
        self._weights, before = weights_of(trainer.replica.module), self._average
        if before and {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in self._weights.items()}:
            raise CheckpointError(
                "the average of the weights is of another model; train without it, or with the model it is of"
            )
        self._average = {k: before[k].to(v) if before else v.clone() for k, v in self._weights.items()}

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        """Take in the new weights."""
        if not event.skipped:
            self._update(list(self._average.values()), list(self._weights.values()), None)

    def inference(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Let evaluations use the average."""
        return self.applied(trainer) if self._evaluate and self._average else nullcontext()

    @contextmanager
    def applied(self, trainer: Trainer) -> Iterator[None]:
        """Let the model hold the average; its own weights come back afterwards, bit for bit."""
        now = weights_of(trainer.replica.module)
        if {k: v.data_ptr() for k, v in now.items()} != {k: v.data_ptr() for k, v in self._weights.items()}:
            raise ConfigError("the model's parameters are not those that are averaged; replace them before fit begins")
        swap(self._weights, self._average)
        try:
            yield
        finally:
            swap(self._weights, self._average)

    def state_dict(self) -> dict[str, Any]:
        """Return the average by the names of the model's state."""
        return {"average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._average = state["average"]
