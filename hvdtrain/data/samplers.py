"""The order of samples: which data set indices a rank loads, batch by batch.

`PartitionSampler` serves training, `EvalSampler` evaluation; both are batch samplers for `torch.utils.data.DataLoader`.
What they yield depends on the seed, the epoch and the position alone, never on the global random state, which they
leave untouched. The arithmetic is `hvdtrain.data.partition`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from hvdtrain.data.partition import BatchPartition, share
from hvdtrain.errors import ConfigError

_WORD = 0xFFFFFFFF


class IndexBatch(list[int]):
    """Data set indices of one batch, and the key from which a loader process seeds its random numbers for it.

    Args:
        indices: Data set indices.
        key: Numbers that tell this batch from every other one of the run, whatever the number of ranks or processes.
    """

    def __init__(self, indices: Iterable[int] = (), key: tuple[int, ...] = ()) -> None:
        super().__init__(indices)
        self.key = key


def epoch_order(length: int, *, shuffle: bool, seed: int, epoch: int, shard: int | None = None) -> torch.Tensor:
    """Return the order in which an epoch goes through a data set.

    NumPy promises the stream of `RandomState` to stay as it is in all versions (NEP 19); torch promises nothing for
    `randperm`. A run that continues under another version of torch therefore meets each sample once all the same.

    Args:
        length: Samples in the data set.
        shuffle: False for 0, 1, 2, and so on.
        seed: Of the shuffle, 0 to 2**64 - 1.
        epoch: Each has an order of its own.
        shard: A number that tells this part of a data set from the others; None for a whole one.

    Returns:
        A permutation of ``range(length)``, int64, shape (length,).

    Raises:
        ConfigError: A value is out of bounds.
    """
    for name, value in (("length", length), ("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**64:
            raise ConfigError(f"{name} must be 0 or more and less than 2**64, got {value}")
    if not shuffle:
        return torch.arange(length)
    words = [seed & _WORD, seed >> 32, epoch & _WORD, epoch >> 32, *([] if shard is None else [shard])]
    order = np.random.RandomState(words).permutation(length)
    return torch.from_numpy(order.astype(np.int64, copy=False))


class PartitionSampler(Sampler[list[int]]):
    """Yields one rank's micro-batches of one epoch, as lists of data set indices, in the order of the steps.

    A rank without samples in a global batch yields nothing for it.

    Args:
        partition: The arithmetic.
        shuffle: Whether each epoch has a random order.
        seed: Of the shuffle.
    """

    def __init__(self, partition: BatchPartition, *, shuffle: bool, seed: int) -> None:
        self.partition = partition
        self.shuffle = shuffle
        self.seed = seed
        self._order: Sequence[Any] | None = None
        self._epoch = 0
        self._first_step = 0

    def set_position(self, epoch: int, start_sample: int = 0, order: Sequence[Any] | None = None) -> None:
        """Choose the epoch, and where in it, the next iterators begin.

        Args:
            epoch: Epochs completed.
            start_sample: Samples of this epoch that are done, over all ranks.
            order: Data set indices of the whole epoch, as many as the partition cuts; else 0, 1, 2, and so on, shuffled
                or not.

        Raises:
            ConfigError: No global batch begins at ``start_sample``.
        """
        self._first_step = self.partition.step_at(start_sample)
        self._epoch, self._order = epoch, order

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches(self._epoch, self._first_step, self._order)

    def _batches(self, epoch: int, first_step: int, order: Any) -> Iterator[list[int]]:
        partition = self.partition
        if order is None:
            order = epoch_order(partition.length, shuffle=self.shuffle, seed=self.seed, epoch=epoch)
        for index in range(first_step, partition.steps_per_epoch):
            for positions in partition.step(index).micro_batches:
                # The position alone, without the rank: micro-batches of equal positions are equal at any world size.
                key = (0, epoch, positions.start)
                indices = order[positions.start : positions.stop]
                yield IndexBatch(indices.tolist() if isinstance(indices, torch.Tensor) else indices, key)

    def __len__(self) -> int:
        return self.partition.micro_batches(self._first_step)


class EvalSampler(Sampler[list[int]]):
    """Yields one rank's contiguous share of a data set in batches, in the data set's own order or another.

    Args:
        length: Samples to evaluate. Where it is less than the world size, some ranks yield nothing.
        batch_size: Samples per batch; the last one may be shorter.
        world_size: Number of ranks.
        rank: Whose share to yield.
        order: Data set indices of all ``length`` samples; else 0, 1, 2, and so on.
        positions: Those of this rank's share in the order; else as even a share as can be.

    Raises:
        ConfigError: A value that cannot work.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        world_size: int = 1,
        rank: int = 0,
        order: Sequence[Any] | None = None,
        positions: range | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.share = share(length, world_size, rank) if positions is None else positions
        self._order = range(length) if order is None else order

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self.share.start, self.share.stop, self.batch_size):
            yield IndexBatch(self._order[start : min(start + self.batch_size, self.share.stop)], (1, start))

    def __len__(self) -> int:
        return math.ceil(len(self.share) / self.batch_size)
