"""How often ranks exchange what they have learned, if not in every step: "local-sgd:8", "diloco:100". Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.errors import ConfigError
from hvdtrain.settings.wording import did_you_mean, shown

_NAMES = ("every-step", "local-sgd", "diloco")
FORMS = ("every-step", "local-sgd:STEPS", "diloco:STEPS")


@dataclass(frozen=True, slots=True)
class Sync:
    """Ranks train apart for some steps, and then agree on weights.

    With the defaults the new weights are the ranks' average (local SGD, Stich 2018, https://arxiv.org/abs/1805.09767). Else the
    way from the last common weights to the average is the gradient of an outer optimizer, SGD with Nesterov's momentum
    (DiLoCo, Douillard et al. 2023, https://arxiv.org/abs/2311.08105).

    Attributes:
        steps: Between two exchanges, 1 or more.
        outer_lr: Learning rate of the outer optimizer.
        outer_momentum: Its momentum, from 0 and less than 1.
    """

    steps: int
    outer_lr: float = 1.0
    outer_momentum: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(f"sync needs a whole number of steps, 1 or more, got {shown(self.steps)}")
        if not 0 < self.outer_lr <= 10:
            raise ConfigError(f"sync's outer_lr must be more than 0 and at most 10, got {shown(self.outer_lr)}")
        if not 0 <= self.outer_momentum < 1:
            raise ConfigError(
                f"sync's outer_momentum must be 0 or more and less than 1, got {shown(self.outer_momentum)}"
            )

    @property
    def averages(self) -> bool:
        """Whether the new weights are the average."""
        return self.outer_lr == 1 and self.outer_momentum == 0


def sync_of(asked: str | Sync | None, asked_by: str = "sync") -> Sync | None:
    """What was asked for; None for an exchange in every step.

    Args:
        asked: None, "every-step", "local-sgd:STEPS", "diloco:STEPS" (with the paper's outer learning rate 0.7 and momentum 0.9)
            or a `Sync`.
        asked_by: How messages call it.

    Raises:
        ConfigError: There is no such thing.
    """
    if asked is None or isinstance(asked, Sync):
        return asked
    if not isinstance(asked, str):
        raise ConfigError(f"{asked_by} takes a name or a hvdtrain.Sync, got {asked!r:.80}")
    name, colon, number = asked.partition(":")
    if name not in _NAMES:
        raise ConfigError(
            f"{asked_by} must be one of {', '.join(FORMS)}, got {shown(asked)}{did_you_mean(name, _NAMES)}"
        )
    if name == "every-step" and not colon:
        return None
    if name == "every-step" or not (number.isascii() and number.isdigit() and 0 < int(number) < 2**31):
        right = "every-step has no number" if name == "every-step" else f"give the steps between exchanges, {name}:100"
        raise ConfigError(f"{asked_by} {shown(asked)}: {right}")
    return Sync(int(number)) if name == "local-sgd" else Sync(int(number), 0.7, 0.9)
