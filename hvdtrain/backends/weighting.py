"""How a loss is weighted, so that the ranks' summed gradients are the gradient of a mean over samples, or over tokens.

A loss is the mean over a weight: the number of its samples, unless another one is said (tokens, pairs, the sum of the
classes' weights). With a total each loss counts ``weight / total``. Without one it counts ``weight / unit``, and the ranks'
sum is multiplied afterwards by ``unit / weight of all ranks``: the plain weight would overflow float16 on the way back. The
unit is near a step's total, the same on all ranks, and a power of two, so that no gradient depends on which one it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from hvdtrain.backends.loss_scale import moment, now
from hvdtrain.errors import TrainingError

if TYPE_CHECKING:
    from hvdtrain.backends.communicator import Communicator

MOST, _LEAST = 1e18, 1e-30
"""The largest weight, and what is as good as 0: some engines add up the ranks' in float32, and gradients may be float32 too."""
_SMALLEST_UNIT = 2.0**-60

_MODULO = 4096  # growing numbers are told modulo this


@dataclass(slots=True)
class Tally:
    """What ranks tell each other with their gradients: summed over the ranks, it says how to scale them.

    Attributes:
        weight: Of the backward passes without a total.
        samples: Of all backward passes.
        uncounted: Backward passes without a total.
        counted: Backward passes with one.
        ranks: Ranks with a backward pass in this step.
        began: `hvdtrain.backends.loss_scale.now` of the first of them, summed over these ranks.
        steps: Optimizer steps on exchanged gradients so far, summed over all ranks.
        replica: The replica's number, summed over all ranks.
        ahead: What `hvdtrain.backends.ahead.Ahead` sends along, summed over all ranks.
    """

    weight: float = 0.0
    samples: int = 0
    uncounted: int = 0
    counted: int = 0
    ranks: int = 0
    began: int = 0
    steps: int = 0
    replica: int = 0
    ahead: int = 0

    SIZE: ClassVar[int] = 9

    def values(self) -> list[float]:
        """As numbers that can be summed, small ones that float32 holds."""
        small = (self.began % _MODULO, self.steps % _MODULO, self.replica % _MODULO)
        counts = (self.samples, self.uncounted, self.counted, self.ranks)
        return [float(v) for v in (self.weight, *counts, *small, self.ahead)]

    @classmethod
    def of(cls, values: Sequence[float]) -> Tally:
        """From the sums; what an engine averaged on the way is made whole again."""
        weight, *counts = values
        return cls(weight, *map(round, counts))


class Weighting:
    """The weights of one replica's losses.

    Args:
        communicator: All ranks.
        divisor: What the engine will divide the ranks' sum by.
        number: The replica's, the same on every rank.

    Attributes:
        tally: Of this rank in this step.
        steps: Optimizer steps on exchanged gradients so far.
        settled: The unit is the same on all ranks.
    """

    def __init__(self, communicator: Communicator, divisor: int, *, number: int = 1) -> None:
        self._communicator = communicator
        self._divisor = divisor
        self._replica = number
        self.steps = 0
        self._unit: float | None = None  # about a step's weight
        self.settled = communicator.wire.size == 1
        self.begin_step()

    def begin_step(self) -> None:
        """Count from nothing."""
        self.tally = Tally(steps=self.steps, replica=self._replica)
        self._shared = (0.0, 0)  # weight and samples of the last loss, if the next one is of the same forward pass
        self._seen = 0.0
        self._counted_weight, self._totals = 0.0, set[float]()

    @property
    def empty(self) -> bool:
        """Whether nothing of this rank has counted in this step."""
        return self._seen == 0

    @property
    def own_weight(self) -> float:
        """What this rank's losses of this step are means over; one forward pass counts once."""
        return self.tally.weight + self._counted_weight

    @property
    def total(self) -> float | None:
        """The total that all of this step's losses gave; None if they gave none, or different ones."""
        return next(iter(self._totals)) if len(self._totals) == 1 else None

    def begin_backward(self) -> None:
        """The step's first backward pass on this rank comes now."""
        self.tally.ranks, self.tally.began = 1, now()

    def weigh(self, samples: int, weight: float | Tensor | None, total: float | None, *, shared: bool) -> float:
        """Count a loss, and return what its gradient is multiplied by.

        Args:
            samples: Of this loss.
            weight: What it is the mean over; None for the samples.
            total: Of the whole step, if known.
            shared: Another loss of the same forward pass follows.

        Raises:
            TrainingError: A number that cannot be, or other words than in this step's earlier calls.
        """
        if samples < 0 or int(samples) != samples:
            raise TrainingError(f"samples must be a whole number, 0 or more, got {samples}")
        samples = int(samples)
        weight = checked(samples if weight is None else weight)
        if self.tally.uncounted + self.tally.counted and (total is None) != (self.tally.uncounted > 0):
            raise TrainingError("give total= to every backward() of a step, or to none")
        if total is not None and not 0 < total < math.inf:
            raise TrainingError(f"total must be positive, got {total}")
        if self._shared[0] and self._shared[0] != weight:
            raise TrainingError(
                f"losses of one forward pass are means over the same samples or weight, got {self._shared[0]:g} and then {weight:g}; "
                "where total= is given, each may have its own"
            )
        self._seen += weight
        self.tally.samples += 0 if shared else samples
        if total is not None:
            self.tally.counted += 1
            self._counted_weight += 0 if shared else weight
            self._totals.add(total)
            return weight / total * self._divisor
        self._shared = (weight, samples) if shared else (0.0, 0)
        self.tally.weight += 0 if shared else weight
        self.tally.uncounted += 1
        if self._unit is None and weight:
            self._unit = _power_of_two(weight * self._divisor)
        return weight / (self._unit or 1.0) * self._divisor

    def close(self) -> None:
        """No loss follows in this step."""
        weight, samples = self._shared
        self.tally.weight += weight
        self.tally.samples += samples
        self._shared = (0.0, 0)

    def settle(self) -> float:
        """Make the unit the same on all ranks, once; every rank must call it before its gradients leave.

        Returns:
            What weights that were given in this step must be multiplied by for it.
        """
        if self.settled:
            return 1.0
        seen = float(self._communicator.all_reduce(torch.tensor(float(self._seen), dtype=torch.float64)))
        if not seen:  # nobody has any
            return 1.0
        before, self._unit, self.settled = self._unit, _power_of_two(seen), True
        return before / self._unit if before is not None and self.tally.uncounted else 1.0

    def factor(self, summed: Tally) -> float | None:
        """What the exchanged gradients must be multiplied by, given the ranks' summed tallies; None if no rank had any.

        NaN, as a mean over nothing is, where there are samples and none of them has a weight.

        Raises:
            TrainingError: The ranks did not do the same; on every rank that knows.
        """
        everyone = self._communicator.wire.size
        if summed.replica != everyone * (self._replica % _MODULO):
            raise TrainingError(
                "the ranks exchange gradients of different replicas; call backward() on several replicas in the same order on every rank"
            )
        if summed.steps != everyone * (self.tally.steps % _MODULO):
            raise TrainingError(
                f"the ranks have taken different numbers of optimizer steps (this one {self.tally.steps}), so that their parameters "
                "differ; step, or call replica.clear(), on all ranks alike"
            )
        if summed.uncounted and summed.counted:
            raise TrainingError(
                "some ranks gave total= to backward() in this step, and others did not; give it on every rank, or on none"
            )
        factor = self.factor_ahead(summed)
        if summed.ranks and summed.uncounted and summed.weight:
            self._unit = _power_of_two(summed.weight)
        return factor

    def factor_ahead(self, summed: Tally) -> float | None:
        """What `factor` will return where the ranks did the same, before the gradients are exchanged."""
        if summed.ranks == 0:
            return None
        if self.tally.ranks == 0:  # the losses of these gradients were scaled when the other ranks began
            self.tally.began = moment(summed.began // summed.ranks, modulo=_MODULO)
        if not summed.uncounted:
            return 1.0
        if not summed.weight:
            return math.nan if summed.samples else 1.0
        return (self._unit or 1.0) / summed.weight


def _power_of_two(value: float) -> float:
    return max(_SMALLEST_UNIT, 2.0 ** math.ceil(math.log2(value))) if value > 0 else 1.0


def weight_of(value: object) -> float | None:
    """Return a weight as a number; None for what is none from 0 to `MOST`."""
    if isinstance(value, str | bytes):
        return None
    plain: Any = value.detach() if isinstance(value, Tensor) else value
    try:
        number = float(plain)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # objects, tensors with dimensions, endless integers
        return None
    if not 0 <= number <= MOST:
        return None
    return number if number >= _LEAST else 0.0


def checked(value: object) -> float:
    """Return a weight as a number.

    Raises:
        TrainingError: It is none that a loss can be a mean over.
    """
    number = weight_of(value)
    if number is None:
        raise TrainingError(
            f"weight must be a number, 0 or more (and at most {MOST:g}), which the loss is a mean over; got {value!r:.80}"
        )
    return number
