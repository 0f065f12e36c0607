"""An average of the weights over the steps, which often does better than the last weights do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hvdtrain.backends.units import cut_like, own_part
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.training.callbacks.weights import weights_of
from hvdtrain.training.events import StepEvent

if TYPE_CHECKING:
    from hvdtrain.training.trainer import Trainer


class ExponentialMovingAverage:
    """Averages parameters and buffers of real and complex numbers: after each step ``average = decay * average + (1 - decay) * weights``.

    Weights of less than 32 bits are averaged in float32: what one step adds would be rounded away.

    With ``sync`` the ranks have weights in common after an exchange alone. Those are averaged then, ``average = decay ** steps *
    average + (1 - decay ** steps) * weights`` with the steps since the last time, and nothing in between.

    Args:
        decay: Between 0 and 1; the average reaches back about ``1 / (1 - decay)`` steps.
        evaluate: Whether evaluations and predictions use the average (of several, the last one's). Checkpoints hold both; ``with
            average.applied(trainer):`` the model holds the average, to export it.

    Raises:
        ConfigError: ``decay`` is out of bounds.
    """

    def __init__(self, decay: float = 0.999, *, evaluate: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"decay must be 0 or more and less than 1, got {decay}")
        self._decay = decay
        self._evaluate = evaluate
        self._average: dict[str, Tensor] = {}
        self._averaged: dict[str, Tensor] = {}  # the model's own
        self._is_applied = False
        self._steps = 0  # that the average has not seen
        self._exchanges = 0  # of weights, as far as it has

    def on_start(self, trainer: Trainer) -> None:
        """Begin with the weights as they are, or go on."""
        self._exchanges = trainer.replica.exchanges
        self._averaged, before = weights_of(trainer.replica.module), self._average
        if before and {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in self._averaged.items()}:
            raise CheckpointError(
                "the average of the weights is of another model; train without it, or with the model it is of"
            )
        self._average = {
            name: cut_like(before.get(name, weight), weight).detach().to(weight.device, _precise(weight), copy=True)
            for name, weight in self._averaged.items()
        }

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        """Take in the new weights."""
        if event.skipped:
            return
        self._steps += 1
        common = trainer.replica.common_weights()
        if common is not None and trainer.replica.exchanges == self._exchanges:
            return
        now = {name: own_part(weight.detach()) for name, weight in self._weights(trainer).items()}
        now |= {name: common[of] for name, of in self._averaged.items() if common is not None and of in common}
        new = [now[name].to(average.dtype) for name, average in self._average.items()]
        update = get_ema_multi_avg_fn(self._decay**self._steps)
        update([own_part(average) for average in self._average.values()], new, None)
        self._steps, self._exchanges = 0, trainer.replica.exchanges

    def inference(self, trainer: Trainer) -> AbstractContextManager[None]:
        """Let evaluations use the average."""
        return self.applied(trainer) if self._evaluate and self._average else nullcontext()

    @contextmanager
    def applied(self, trainer: Trainer) -> Iterator[None]:
        """Let the model hold the average; its own weights, which are kept beside it, come back afterwards, bit for bit."""
        if self._is_applied:  # an evaluation in here
            yield
            return
        weights = self._weights(trainer)
        own = {name: weight.detach().clone() for name, weight in weights.items()}
        self._is_applied = True
        try:
            _copy(self._average, weights)
            yield
        finally:
            _copy(own, weights)
            self._is_applied = False

    def state_dict(self) -> dict[str, Any]:
        """Return the average by the names of the model's state."""
        return {"average": self._average, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._average = state["average"]
        self._steps = int(state.get("steps", 0))

    def _weights(self, trainer: Trainer) -> dict[str, Tensor]:
        """The model's, which may have moved but must be those that are averaged."""
        if not self._averaged:
            raise ConfigError("there is no average of the weights yet; it begins with fit")
        now = weights_of(trainer.replica.module)
        parameters = {name: id(weight) for name, weight in now.items() if isinstance(weight, nn.Parameter)}
        if now.keys() != self._averaged.keys() or any(
            id(self._averaged[name]) != one for name, one in parameters.items()
        ):
            raise ConfigError("the model's parameters are not those that are averaged; replace them before fit begins")
        return now


def _precise(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else weight.dtype


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        own_part(weight).copy_(own_part(values[name]))
