"""What repeated measurements come to."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The median of measurements, and the quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(low=values[0], median=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low=low, median=median, high=high)

    def scaled(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(low=factor * self.low, median=factor * self.median, high=factor * self.high)

    def as_json(self) -> list[float]:
        """The lower quartile, the median, the upper quartile."""
        return [self.low, self.median, self.high]


def digits(value: float) -> str:
    """Three digits at least, and no exponent where a number is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
