"""A sampler that knows how much of an epoch is done, and cuts the rest anew when the ranks have changed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch.utils.data import Sampler

from hvdtrain.horovod.state import rank, size


class ElasticSampler(Sampler[int]):
    """This rank's share of what is left of an epoch.

    Put it into the `TorchState`, call `record_batch` after each batch, and `set_epoch` at the end of each epoch.

    Args:
        dataset: Of constant length.
        shuffle: In an order that depends on ``seed`` and the epoch; the same on every rank.
        seed: The same on every rank.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.processed_num = 0
        self.num_replicas = 0
        self.rank = 0
        self.remaining_indices: list[int] = []
        self.num_samples = 0
        self.total_size = 0
        self.reset()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, of which nothing is done yet."""
        self.epoch = epoch
        self.processed_num = 0
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """Every rank has done ``batch_size`` more samples.

        Args:
            batch_idx: Of no account.
            batch_size: Of each rank's batch. More than was left counts as what was left, so that a short last batch may be
                recorded with the full size.
        """
        self.processed_num = min(self.processed_num + batch_size * self.num_replicas, len(self.dataset))

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many samples of it are done over all ranks."""
        return {"epoch": self.epoch, "processed_num": self.processed_num}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there, and cut what is left among the ranks there are now."""
        self.epoch = state_dict["epoch"]
        self.processed_num = state_dict["processed_num"]
        self.reset()

    def reset(self) -> None:
        """Cut what is left among the ranks there are now."""
        self.num_replicas, self.rank = size(), rank()
        order = list(range(len(self.dataset)))
        if self.shuffle:
            random.Random(self.seed + self.epoch).shuffle(order)
        self.remaining_indices = order[self.processed_num :]
        self.num_samples = -(-len(self.remaining_indices) // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def __iter__(self) -> Iterator[int]:
        left = self.remaining_indices
        padded = [left[i % len(left)] for i in range(self.total_size)]  # all ranks get as many
        return iter(padded[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        return self.num_samples
