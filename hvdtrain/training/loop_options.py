"""What a training loop is told once, for all of its steps: checked before anything is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import LBFGS, Optimizer

from hvdtrain.backends.exclusions import check_combination
from hvdtrain.backends.reduce_dtype import reduce_dtype_of
from hvdtrain.backends.units import nature_of
from hvdtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopOptions:
    """Numbers and choices of a loop, as `hvdtrain.Trainer` has them.

    Raises:
        ConfigError: One of them cannot work.
    """

    precision: str
    channels_last: bool
    accumulate: int
    clip_norm: float | None
    on_nan: str
    seed: int
    workers: int
    collate: Callable[[list[Any]], Any] | None
    log_every: int
    checkpoint_every: int
    checkpoint_minutes: float | None
    checkpoint_modules: str | None
    checkpoint_policy: str
    compile: bool | Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("accumulate", "log_every"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.checkpoint_minutes is not None and not self.checkpoint_minutes > 0:
            raise ConfigError(f"checkpoint_minutes must be more than 0, got {self.checkpoint_minutes}")
        if self.on_nan not in ("stop", "skip"):
            raise ConfigError(f"on_nan must be 'stop' or 'skip', got {self.on_nan!r}")

    @property
    def skips_nonfinite(self) -> bool:
        """Whether a step whose gradient is not finite is left out."""
        return self.on_nan == "skip"

    @property
    def compiles(self) -> bool:
        """Whether the model is compiled."""
        return self.compile is not False

    @property
    def checkpoint_s(self) -> float:
        """Seconds between checkpoints; infinite for none by time."""
        return math.inf if self.checkpoint_minutes is None else 60 * self.checkpoint_minutes

    def check(self, optimizer: Optimizer, replica_options: Mapping[str, Any], engine: str) -> None:
        """Refuse what does not go together.

        Args:
            optimizer: What trains.
            replica_options: For `Backend.replicate`.
            engine: The backend's name.

        Raises:
            ConfigError: Two of them, or one and the engine, exclude each other; or this loop cannot step the optimizer.
        """
        if isinstance(optimizer, LBFGS):
            raise ConfigError(
                "LBFGS evaluates the loss several times a step, which this loop does not; choose another optimizer"
            )
        asked = {
            **replica_options,
            "accumulate": self.accumulate > 1,
            "checkpoint_modules": self.checkpoint_modules is not None,
            "compile": self.compiles,
            **nature_of(optimizer),
            "clip_norm": self.clip_norm is not None,
            "on_nan": self.skips_nonfinite,
            "reduce_dtype": reduce_dtype_of(replica_options.get("reduce_dtype")) is not None,
            "channels_last": self.channels_last,
            "scaler": self.precision == "fp16",
        }
        check_combination(asked, engine)

    def compared(self) -> dict[str, Any]:
        """What must be the same on every rank that calls `Trainer.fit`, by the names of its arguments."""
        names = (
            "accumulate",
            "seed",
            "precision",
            "channels_last",
            "log_every",
            "checkpoint_every",
            "checkpoint_minutes",
        )
        return {name: getattr(self, name) for name in names}
