"""Which of two values of a metric is the better one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hvdtrain.errors import ConfigError


class Goal:
    """A metric that is to become smaller or larger.

    Args:
        metric: Its name in the evaluation's metrics.
        mode: "min" or "max".
        min_delta: What is no more than this much better does not count as better.

    Attributes:
        worst: What every value is better than.

    Raises:
        ConfigError: An argument cannot work.
    """

    def __init__(self, metric: str, mode: str, min_delta: float = 0.0) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"mode must be 'min' or 'max', got {mode!r}")
        if not 0 <= min_delta < math.inf:
            raise ConfigError(f"min_delta must be 0 or more, got {min_delta}")
        self.metric, self.mode = metric, mode
        self._sign = 1.0 if mode == "min" else -1.0
        self._min_delta = min_delta
        self.worst = self._sign * math.inf

    def of(self, callback: object) -> str:
        """The name of a callback's state: values of another metric, or of the other direction, say nothing about this one."""
        return f"{type(callback).__name__} of {self.metric} ({self.mode})"

    def value(self, metrics: Mapping[str, float]) -> float:
        """Return the metric.

        Raises:
            ConfigError: The evaluation does not report it.
        """
        if self.metric not in metrics:
            raise ConfigError(f"there is no metric {self.metric!r}; the evaluation reports {', '.join(metrics)}")
        return metrics[self.metric]

    def improves(self, value: float, best: float) -> bool:
        """Whether a value is better than the best so far; NaN never is."""
        return self._sign * value < self._sign * best - self._min_delta
