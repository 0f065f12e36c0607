"""The parts in which ranks that train apart exchange a model's weights, one after the other. No messages here, numbers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from hvdtrain.backends.rounds import Round


@dataclass(slots=True, eq=False)
class Fragment:
    """Parameters that are exchanged together.

    Attributes:
        left: Steps until they are sent.
        since: Steps since they were sent.
        weight: What this rank's losses were means over in those.
        total: The weight of the whole global batches in those, as far as losses said it.
        always: This rank had samples in each of those, and its losses said the total.
        parameters: In the model's order.
        under_way: The exchange that has not been taken in yet.
    """

    left: int
    since: int = 0
    weight: float = 0.0
    total: float = 0.0
    always: bool = True
    parameters: list[nn.Parameter] = field(default_factory=list)
    under_way: Round | None = None

    def count(self, weight: float, total: float, counted: bool) -> None:
        """Note one step: what the losses were means over, of this rank and, if they said it, of all; and whether it had any."""
        self.left -= 1
        self.since += 1
        self.weight += weight
        self.total += total
        self.always &= counted and total > 0

    @property
    def said(self) -> list[float]:
        """What the ranks tell each other of these steps."""
        return [self.weight, self.total if self.always else 0.0, float(self.since)]

    def begin(self, left: int) -> None:
        """Count anew."""
        self.left, self.since, self.weight, self.total, self.always = left, 0, 0.0, 0.0, True

    @property
    def counts(self) -> list[float]:
        """What it has counted, to be saved."""
        return [float(self.left), float(self.since), self.weight, self.total, float(self.always)]

    def take(self, counts: Sequence[float]) -> None:
        """Go on from `counts`."""
        left, since, self.weight, self.total, always = counts
        self.left, self.since, self.always = int(left), int(since), bool(always)


def cut(sizes: Sequence[int], number: int) -> list[int]:
    """Which part each of a row of parameters belongs to: runs of about equally many numbers, none without a parameter.

    Args:
        sizes: How many numbers each parameter has; at least as many parameters as parts.
        number: Of parts.
    """
    whole, before, part = sum(sizes), 0, 0
    parts = []
    for at, size in enumerate(sizes):
        wanted = int((before + size / 2) * number / whole) if whole else 0
        latest = number - (len(sizes) - at)  # each part that follows needs a parameter of those that follow
        if at:
            part = max(part, min(wanted, part + 1, number - 1), latest)
        parts.append(part)
        before += size
    return parts
