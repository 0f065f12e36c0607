"""Which samples stay with which rank for the whole run, and in which order a rank goes through its own.

With ``partition="batch"`` every rank may come to read any sample. Otherwise the data set is cut once, and a rank reads
nothing of the others':

* "sample": rank r keeps the r-th contiguous part;
* "sample-strided": rank r keeps every world-size-th sample, from the r-th on;
* "sample-node": each node keeps a contiguous part, as large as its number of ranks says, of which its ranks take other
  samples in each epoch;
* "sample-own": each rank gives a data set of its own, with as many samples as it likes.

Each epoch shuffles within what is kept. Parts that are cut here differ by at most one sample for each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hvdtrain.data.partition import share
from hvdtrain.data.samplers import epoch_order
from hvdtrain.errors import ConfigError

PARTITIONS = ("batch", "sample", "sample-strided", "sample-node", "sample-own")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """What one rank, or all ranks of one node, read of a data set.

    Attributes:
        kept: Data set indices.
        place: This rank's place among all.
        positions: This rank's, in an epoch's order: that is the shards' orders one after the other.
        first: Position of the shard's first sample in that order.
        number: Tells it from the other shards.
        cut: How messages and checkpoints name the way in which the data set was cut.
        sizes: Samples of each rank's part, where they may be any.
        smallest: Samples of the rank that has fewest.
    """

    kept: range
    place: int
    positions: range
    first: int
    number: int
    cut: str
    sizes: tuple[int, ...] | None = None
    smallest: int

    def order(self, *, shuffle: bool, seed: int, epoch: int) -> ShardOrder:
        """Return the order in which an epoch goes through the shard."""
        order = epoch_order(len(self.kept), shuffle=shuffle, seed=seed, epoch=epoch, shard=self.number)
        return ShardOrder(self.kept.start + self.kept.step * order, self.first)


class ShardOrder(Sequence[int]):
    """The part of an epoch's order that lies in one shard, indexed by positions in the whole.

    Args:
        indices: Data set indices, int64, shape (samples of the shard,).
        first: Position of the first of them.
    """

    def __init__(self, indices: torch.Tensor, first: int) -> None:
        self._indices, self._first = indices, first

    def __len__(self) -> int:
        return self._first + len(self._indices)

    def __getitem__(self, position: int | slice) -> Any:
        if isinstance(position, slice):
            return self._indices[position.start - self._first : position.stop - self._first].tolist()
        return int(self._indices[position - self._first])


def shard_of(partition: str, length: int, rank: int, nodes: Sequence[object]) -> Shard:
    """Return what a rank keeps.

    Args:
        partition: One of `PARTITIONS` but "batch" and "sample-own".
        length: Samples of the data set.
        rank: Whose shard.
        nodes: The node of each rank; they are numbered as their first ranks are.
    """
    world_size = len(nodes)
    smallest = length // world_size
    if partition == "sample-node":
        named = list(dict.fromkeys(nodes))
        numbers = [named.index(node) for node in nodes]
        order = sorted(range(world_size), key=lambda other: (numbers[other], other))
        mine = [share(length, world_size, at) for at, other in enumerate(order) if numbers[other] == numbers[rank]]
        kept = range(mine[0].start, mine[-1].stop)
        cut = f"{partition} over {'+'.join(str(numbers.count(number)) for number in range(len(named)))} ranks"
        place = order.index(rank)
        return Shard(
            kept=kept,
            place=place,
            positions=share(length, world_size, place),
            first=kept.start,
            number=numbers[rank],
            cut=cut,
            smallest=smallest,
        )
    positions = share(length, world_size, rank)
    kept = range(rank, length, world_size) if partition == "sample-strided" else positions
    cut = f"{partition} over {world_size} ranks"
    return Shard(
        kept=kept, place=rank, positions=positions, first=positions.start, number=rank, cut=cut, smallest=smallest
    )


def own_shard(rank: int, sizes: Sequence[int]) -> Shard:
    """Return a rank's shard where each rank gives a data set of its own, of these sizes."""
    first = sum(sizes[:rank])
    return Shard(
        kept=range(sizes[rank]),
        place=rank,
        positions=range(first, first + sizes[rank]),
        first=first,
        number=rank,
        cut=f"sample-own of {'+'.join(map(str, sizes))} samples",
        sizes=tuple(sizes),
        smallest=min(sizes),
    )


def check_partition(partition: str, *, sampler: object) -> None:
    """Refuse a partition that there is not, or that somebody else's order contradicts.

    Raises:
        ConfigError: Says what there is, or what to leave out.
    """
    if partition not in PARTITIONS:
        raise ConfigError(f"partition must be one of {', '.join(PARTITIONS)}, got {partition!r} (--partition)")
    if partition != "batch" and sampler is not None:
        raise ConfigError(
            f"partition={partition!r} and a sampler (a {type(sampler).__name__}) exclude each other: the sampler orders the whole "
            "data set, and each rank goes through a part of its own; leave the sampler out, or use partition='batch'"
        )
