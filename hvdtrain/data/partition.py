"""Which rank takes which samples of which global batch: pure index arithmetic.

Global batch ``b`` holds the positions ``b * G`` to ``(b + 1) * G`` of an epoch's order, whatever the number of ranks.
Each rank takes a contiguous share of it, cut into micro-batches; shares differ by at most one sample. So the global
batches, and with them the training, are the same at every world size, and every sample counts exactly once.

`SamplePartition` has global batches of the same sizes, and fills them from shards: parts of the data set that stay with
their ranks for the whole run (`hvdtrain.data.shards`).

Everything here is a `range`: memory does not grow with the data set. No torch, no order of samples (see
`hvdtrain.data.samplers`), no padding, no repeated samples.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from hvdtrain.errors import ConfigError

LAST_BATCH = ("keep", "drop", "merge")


def share(total: int, parts: int, index: int) -> range:
    """Return part ``index`` of ``range(total)`` cut into ``parts`` contiguous parts.

    Sizes differ by at most one; the first ``total % parts`` parts are the larger ones. A part may be empty.

    Raises:
        ConfigError: ``total`` is negative, ``parts`` is less than 1, or ``index`` is no part.
    """
    if total < 0 or parts < 1 or not 0 <= index < parts:
        raise ConfigError(f"there is no part {index} of {parts} parts of {total} samples")
    size, larger = divmod(total, parts)
    start = index * size + min(index, larger)
    return range(start, start + size + (index < larger))


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one rank does for one global batch.

    Attributes:
        start: Position of the global batch's first sample in the epoch's order.
        samples: Samples of the global batch over all ranks and micro-batches.
        micro_batches: This rank's positions in the epoch's order, only non-empty ranges; () when it has no sample.
        every_rank: Whether every rank has at least one sample in this global batch.
        passes: Micro-batches of the rank that has most.
    """

    start: int
    samples: int
    micro_batches: tuple[range, ...]
    every_rank: bool
    passes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPartition:
    """Cuts an epoch into global batches and those into one rank's micro-batches.

    Args:
        length: Samples in the data set; it may be less than the world size or the global batch.
        global_batch_size: Samples per optimizer step over all ranks and micro-batches; the last one of an epoch may
            be shorter.
        world_size: Number of ranks.
        rank: Whose micro-batches to compute.
        accumulate: Micro-batches that a rank's share is cut into; fewer where the share has fewer samples.
        last_batch: What becomes of the samples that do not fill a last global batch: "keep" makes them a shorter one;
            "drop" leaves them out in that epoch; "merge" joins them with the global batch before, which is then up to
            twice as long. Where they are all that there is, "merge" keeps them.

    Raises:
        ConfigError: A value that cannot work; the message names it.
    """

    length: int
    global_batch_size: int
    world_size: int = 1
    rank: int = 0
    accumulate: int = 1
    last_batch: str = "keep"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"the data set has {self.length} samples; it needs at least 1")
        for name in ("global_batch_size", "world_size", "accumulate"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"rank {self.rank} does not exist in a world of {self.world_size}; ranks are 0 to {self.world_size - 1}"
            )
        if self.last_batch not in LAST_BATCH:
            raise ConfigError(
                f"last_batch must be one of {', '.join(LAST_BATCH)}, got {self.last_batch!r} (--last-batch)"
            )
        if self.last_batch == "drop" and self.length < self.global_batch_size:
            raise ConfigError(
                f"the data set has {self.length} samples, fewer than the global batch of {self.global_batch_size}, so that "
                "dropping the last batch leaves no step; use a smaller batch, or last_batch='keep' (--last-batch keep)"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        if self.last_batch == "keep":
            return -(-self.length // self.global_batch_size)
        return max(1, self.length // self.global_batch_size)

    @property
    def samples_per_epoch(self) -> int:
        """Samples in an epoch: ``length``, less what is dropped."""
        return self.steps_per_epoch * self.global_batch_size if self.last_batch == "drop" else self.length

    @property
    def needs_empty_batches(self) -> bool:
        """Whether some rank has fewer micro-batches than another in some step."""
        if self.world_size == 1:
            return False
        return any(min(self.accumulate, fewest) < min(self.accumulate, most) for fewest, most in self._kinds())

    @property
    def every_rank(self) -> bool:
        """Whether every rank has a sample in every step."""
        return all(fewest > 0 for fewest, _ in self._kinds())

    def step(self, index: int) -> Step:
        """Return this rank's part of global batch ``index`` of an epoch.

        Raises:
            IndexError: An epoch has no such global batch.
        """
        if not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"there is no global batch {index} in an epoch of {self.steps_per_epoch}")
        start = index * self.global_batch_size
        samples = self._samples(index)
        mine = self._mine(start, samples)
        fewest, most = self._extremes(start, samples)
        pieces = (share(len(mine), self.accumulate, piece) for piece in range(min(self.accumulate, len(mine))))
        return Step(
            start=start,
            samples=samples,
            micro_batches=tuple(mine[piece.start : piece.stop] for piece in pieces),
            every_rank=fewest > 0,
            passes=min(self.accumulate, most),
        )

    def steps(self, start_sample: int = 0) -> Iterator[Step]:
        """Return this rank's steps from a position in the epoch to its end, computed one at a time.

        Args:
            start_sample: Samples of the epoch that are done, over all ranks: a multiple of the global batch size, or
                all of them.

        Raises:
            ConfigError: No global batch begins there.
        """
        return (self.step(index) for index in range(self.step_at(start_sample), self.steps_per_epoch))

    def step_at(self, start_sample: int) -> int:
        """Return the index of the global batch that begins at ``start_sample``; ``steps_per_epoch`` at the end.

        Raises:
            ConfigError: No global batch begins there.
        """
        if start_sample in (self.length, self.samples_per_epoch):
            return self.steps_per_epoch
        index, rest = divmod(start_sample, self.global_batch_size)
        if rest or not 0 <= index < self.steps_per_epoch:
            raise ConfigError(
                f"cannot continue after {start_sample} of {self.samples_per_epoch} samples: no global batch of "
                f"{self.global_batch_size} begins there. Continue with the global batch size and the last_batch= "
                f"(--last-batch, now {self.last_batch}) that the run began with, or from the end of an epoch"
            )
        return index

    def micro_batches(self, first_step: int = 0) -> int:
        """Return how many micro-batches this rank has from a global batch to the end of the epoch."""
        remaining = self.steps_per_epoch - first_step
        if remaining == 0:
            return 0
        last = len(self.step(self.steps_per_epoch - 1).micro_batches)
        return (remaining - 1) * len(self.step(first_step).micro_batches) + last

    def _mine(self, start: int, samples: int) -> range:
        """This rank's positions of the global batch that begins at ``start``."""
        mine = share(samples, self.world_size, self.rank)
        return range(start + mine.start, start + mine.stop)

    def _samples(self, index: int) -> int:
        """Of a global batch, over all ranks."""
        start = index * self.global_batch_size
        merged = self.last_batch == "merge" and index == self.steps_per_epoch - 1
        return self.length - start if merged else min(self.global_batch_size, self.length - start)

    def _extremes(self, start: int, samples: int) -> tuple[int, int]:
        """Samples of the ranks with fewest and with most in a global batch."""
        return samples // self.world_size, -(-samples // self.world_size)

    def _kinds(self) -> Iterator[tuple[int, int]]:
        """`_extremes` of the first and the last global batch; those between are as the first."""
        for index in {0, self.steps_per_epoch - 1}:
            yield self._extremes(index * self.global_batch_size, self._samples(index))


@functools.lru_cache(maxsize=8)  # each step begins where the one before ended
def taken(sizes: tuple[int, ...], done: int) -> tuple[int, ...]:
    """Return how many samples each shard has given, after so many of all, where all are used up at the same pace.

    Sample i of a shard of s comes after (2 i + 1) / 2 s of the epoch; at the same point, that of the lower shard first. (So does
    Webster's method hand out seats one after the other.)

    Args:
        sizes: Samples of each shard.
        done: 0 to all of them.
    """
    total = sum(sizes)
    counts = [(2 * size * done + total) // (2 * total) for size in sizes]  # all that come up to done / total
    excess = sum(counts) - done
    back = 1 if excess > 0 else 0  # take the latest back, or give the earliest
    sign = 1 - 2 * back
    queue = [
        (sign * Fraction(2 * (count - back) + 1, 2 * size), sign * shard)
        for shard, (count, size) in enumerate(zip(counts, sizes, strict=True))
        if 0 <= count - back < size
    ]
    heapq.heapify(queue)
    for _ in range(abs(excess)):
        _, signed = heapq.heappop(queue)
        shard = sign * signed
        counts[shard] += sign
        if 0 <= counts[shard] - back < sizes[shard]:
            at = Fraction(2 * (counts[shard] - back) + 1, 2 * sizes[shard])
            heapq.heappush(queue, (sign * at, signed))
    return tuple(counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplePartition(BatchPartition):
    """Fills each global batch from shards, one a rank, that are used up at the same pace (see `taken`).

    Positions are those of an epoch's order that is the shards' orders one after the other. Global batches are as many and as
    large as `BatchPartition`'s, unequal shards end in the same step, and every sample counts exactly once. Where the shards
    differ by one sample at most, so do the ranks' parts of a global batch.

    Args:
        sizes: Samples of each rank's shard; None for ``share(length, world_size, rank)``.
    """

    sizes: tuple[int, ...] | None = None

    def micro_batches(self, first_step: int = 0) -> int:
        """Return how many micro-batches this rank has from a global batch to the end of the epoch."""
        return sum(len(self.step(index).micro_batches) for index in range(first_step, self.steps_per_epoch))

    def _mine(self, start: int, samples: int) -> range:
        if self.sizes is None:  # the same, in less time
            shard = share(self.length, self.world_size, self.rank)
            before, after = (len(share(done, self.world_size, self.rank)) for done in (start, start + samples))
        else:
            first = sum(self.sizes[: self.rank])
            shard = range(first, first + self.sizes[self.rank])
            before, after = (taken(self.sizes, done)[self.rank] for done in (start, start + samples))
        return shard[before:after]

    def _extremes(self, start: int, samples: int) -> tuple[int, int]:
        if self.sizes is None:
            return BatchPartition._extremes(self, start, samples)
        given = [
            after - before
            for before, after in zip(taken(self.sizes, start), taken(self.sizes, start + samples), strict=True)
        ]
        return min(given), max(given)

    def _kinds(self) -> Iterator[tuple[int, int]]:
        if self.sizes is None:
            yield from BatchPartition._kinds(self)
            return
        for index in range(self.steps_per_epoch):
            yield self._extremes(index * self.global_batch_size, self._samples(index))
