"""Latency and bandwidth of a link out of the times of all-reduces. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hvdtrain.bench.forms import Link
from hvdtrain.errors import ConfigError

FEWEST_SIZES = 3
_LEAST_LATENCY_S, _MOST_BANDWIDTH = 1e-9, 1e15


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A straight line through times by size, read as a ring's.

    Attributes:
        link: What it says of the link.
        error: Of a size that was left out when the line was drawn, as a share of its time: the root of the mean square.
        points: How many sizes.
    """

    link: Link
    error: float
    points: int

    @property
    def sees_latency(self) -> bool:
        """Whether the smallest sizes took as long as they do for a reason other than their bytes."""
        return self.link.latency_s > _LEAST_LATENCY_S

    @property
    def sees_bandwidth(self) -> bool:
        """Whether the largest sizes took longer than the smallest."""
        return self.link.bytes_per_s < _MOST_BANDWIDTH


def fit_ring(points: Sequence[tuple[float, float]], ranks: int) -> Fit:
    """Fit ``2(n-1) latency + 2(n-1)/n size / bandwidth``, errors counted in shares of the times.

    Args:
        points: Bytes and seconds, of three sizes or more.
        ranks: n, 2 or more.

    Raises:
        ConfigError: There are too few sizes.
    """
    if len({size for size, _ in points}) < FEWEST_SIZES:
        raise ConfigError("latency and bandwidth need all-reduces of at least three sizes; give a larger --max-bytes")
    fixed_s, per_byte_s = _line(points)
    link = Link(
        latency_s=max(fixed_s / (2 * (ranks - 1)), _LEAST_LATENCY_S),
        bytes_per_s=min(2 * (ranks - 1) / ranks / per_byte_s, _MOST_BANDWIDTH) if per_byte_s > 0 else _MOST_BANDWIDTH,
    )
    missed = []
    for at, (size, seconds) in enumerate(points):
        fixed, per_byte = _line([*points[:at], *points[at + 1 :]])
        missed.append((fixed + per_byte * size) / seconds - 1)
    return Fit(link=link, error=math.sqrt(sum(miss * miss for miss in missed) / len(missed)), points=len(points))


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The line that is least wrong in shares of the values; neither of its two numbers is negative."""
    weights = [1 / (seconds * seconds) for _, seconds in points]
    w = sum(weights)
    x = sum(weight * size for weight, (size, _) in zip(weights, points, strict=True))
    y = sum(weight * seconds for weight, (_, seconds) in zip(weights, points, strict=True))
    xx = sum(weight * size * size for weight, (size, _) in zip(weights, points, strict=True))
    xy = sum(weight * size * seconds for weight, (size, seconds) in zip(weights, points, strict=True))
    spread = w * xx - x * x
    slope = (w * xy - x * y) / spread if spread > 0 else 0.0
    fixed = (y - slope * x) / w
    if slope < 0:
        return y / w, 0.0
    if fixed < 0:
        return 0.0, xy / xx
    return fixed, slope
