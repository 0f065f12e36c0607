"""How often ranks exchange what they have learned, if not in every step: "local-sgd:8", "diloco:100,delay=10,fragments=4".

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.errors import ConfigError
from hvdtrain.settings.wording import did_you_mean, shown

_NAMES = ("every-step", "local-sgd", "diloco")
_MORE = ("delay", "fragments")
FORMS = ("every-step", "local-sgd:STEPS", "diloco:STEPS")
"""What may be asked for; of the last two, ``,delay=STEPS`` and ``,fragments=NUMBER`` may follow."""


@dataclass(frozen=True, slots=True)
class Sync:
    """Ranks train apart for some steps, and then agree on weights.

    With the defaults the new weights are the ranks' average (local SGD, Stich 2018, https://arxiv.org/abs/1805.09767). Else the
    way from the last common weights to the average is the gradient of an outer optimizer, SGD with Nesterov's momentum
    (DiLoCo, Douillard et al. 2023, https://arxiv.org/abs/2311.08105).

    With a delay the messages travel beside the next steps. What a rank has learned in them is kept: to its weights is added
    what the exchange changed, ``own += new - sent``, where ``sent`` are its weights of ``delay`` steps ago and ``new`` the common
    ones that follow from all ranks' (Douillard et al. 2025, "Streaming DiLoCo with overlapping communication",
    https://arxiv.org/abs/2501.18512, mixes both instead). With fragments each of them is exchanged every so many steps, one after
    the other.

    Attributes:
        steps: Between two exchanges, 1 or more.
        outer_lr: Learning rate of the outer optimizer.
        outer_momentum: Its momentum, from 0 and less than 1.
        delay: Steps that are taken while an exchange is under way, from 0 and less than ``steps``; the same on every rank.
        fragments: In how many parts, at steps of their own, the model is exchanged; from 1 to ``steps``.
    """

    steps: int
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    delay: int = 0
    fragments: int = 1

    def __post_init__(self) -> None:
        if not _whole(self.steps) or self.steps < 1:
            raise ConfigError(f"sync needs a whole number of steps, 1 or more, got {shown(self.steps)}")
        if not _real(self.outer_lr) or not 0 < self.outer_lr <= 10:
            raise ConfigError(f"sync's outer_lr must be more than 0 and at most 10, got {shown(self.outer_lr)}")
        if not _real(self.outer_momentum) or not 0 <= self.outer_momentum < 1:
            raise ConfigError(
                f"sync's outer_momentum must be 0 or more and less than 1, got {shown(self.outer_momentum)}"
            )
        if not _whole(self.delay) or not 0 <= self.delay < self.steps:
            raise ConfigError(
                f"sync's delay must be a whole number of steps from 0 and less than the {self.steps} between exchanges, so that one has "
                f"arrived before the next begins; got {shown(self.delay)}"
            )
        if not _whole(self.fragments) or not 1 <= self.fragments <= self.steps:
            raise ConfigError(
                f"sync's fragments must be a whole number from 1 to the {self.steps} steps between exchanges, so that each has a step of its "
                f"own; got {shown(self.fragments)}"
            )

        for name in ("outer_lr", "outer_momentum"):  # checkpoints compare them as text: 1 and 1.0 are one
            object.__setattr__(self, name, float(getattr(self, name)))

    def first_due(self, fragment: int) -> int:
        """After how many steps a fragment is exchanged for the first time; then every ``steps``."""
        return self.steps * (fragment + 1) // self.fragments

    @property
    def averages(self) -> bool:
        """Whether the new weights are the average."""
        return self.outer_lr == 1 and self.outer_momentum == 0


def sync_of(asked: str | Sync | None, asked_by: str = "sync") -> Sync | None:
    """What was asked for; None for an exchange in every step.

    Args:
        asked: None, "every-step", "local-sgd:STEPS", "diloco:STEPS" (with the paper's outer learning rate 0.7 and momentum 0.9),
            the last two perhaps with ",delay=STEPS" and ",fragments=NUMBER", or a `Sync`.
        asked_by: How messages call it.

    Raises:
        ConfigError: There is no such thing.
    """
    if asked is None or isinstance(asked, Sync):
        return asked
    if not isinstance(asked, str):
        raise ConfigError(f"{asked_by} takes a name or a hvdtrain.Sync, got {asked!r:.80}")
    kind, *more = asked.split(",")
    name, colon, number = kind.partition(":")
    if name not in _NAMES:
        raise ConfigError(
            f"{asked_by} must be one of {', '.join(FORMS)}, got {shown(asked)}{did_you_mean(name, _NAMES)}"
        )
    if name == "every-step":
        if colon or more:
            raise ConfigError(f"{asked_by} {shown(asked)}: every-step has no number")
        return None
    if not _is_number(number) or int(number) == 0:
        raise ConfigError(f"{asked_by} {shown(asked)}: give the steps between exchanges, {name}:100")
    outer = (1.0, 0.0) if name == "local-sgd" else (0.7, 0.9)
    return Sync(int(number), *outer, **_more(asked, more, asked_by))


def group_of(asked: str | int | None, asked_by: str = "sync_group") -> str | int | None:
    """What kind of groups of ranks was asked for: "node", a number of ranks, or None for none.

    Args:
        asked: That, also in text, and "none".
        asked_by: How messages call it.

    Raises:
        ConfigError: There is no such thing.
    """
    if asked is None or asked in ("none", "node"):
        return None if asked == "none" else asked
    number = int(asked) if isinstance(asked, str) and _is_number(asked) else asked
    if not _whole(number) or int(number) < 1:
        raise ConfigError(f"{asked_by} must be none, node or a number of ranks from 1, got {shown(asked)}")
    return int(number)


def _more(asked: str, words: list[str], asked_by: str) -> dict[str, int]:
    """What follows the steps, by name."""
    found: dict[str, int] = {}
    for word in words:
        name, _, number = word.partition("=")
        if name not in _MORE:
            raise ConfigError(
                f"{asked_by} {shown(asked)}: delay=STEPS and fragments=NUMBER may follow the steps, got {shown(word)}"
                f"{did_you_mean(name, _MORE)}"
            )
        if name in found or not _is_number(number):
            raise ConfigError(f"{asked_by} {shown(asked)}: give {name} once, and as a whole number, {name}=4")
        found[name] = int(number)
    return found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < 2**31


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
