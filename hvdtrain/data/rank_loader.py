"""This rank's share of a data set as batches on its device, for people who keep their own loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from hvdtrain.data.loader import empty_batch, make_loader, to_device
from hvdtrain.data.partition import BatchPartition
from hvdtrain.data.samplers import PartitionSampler
from hvdtrain.data.shared_memory import check_shared_memory


class RankLoader:
    """Iterate over it once per epoch; see `hvdtrain.backends.base.Backend.loader`.

    Its state is the position in the data, counted in samples over all ranks; a batch that was handed out is done. A state of
    the middle of an epoch, or of its last batch, goes on there: the next iteration hands out what is left of that epoch.

    Attributes:
        epoch: The epoch that the next iteration begins; set it to continue an earlier run.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        world_size: int,
        rank: int,
        device: torch.device,
        shuffle: bool = False,
        seed: int = 0,
        workers: int = 0,
        local_world_size: int = 1,
    ) -> None:
        self.epoch = 0
        self._under_way: tuple[int, int] | None = None  # epoch and samples done, while one is iterated over
        self._first_sample = 0  # of the next iteration
        self._dataset = dataset
        self._device = device
        self._partition = BatchPartition(
            length=len(dataset),  # type: ignore[arg-type]
            global_batch_size=batch_size * world_size,
            world_size=world_size,
            rank=rank,
        )
        check_shared_memory(dataset, batch_size=batch_size, workers=workers, ranks=local_world_size)
        self._sampler = PartitionSampler(self._partition, shuffle=shuffle, seed=seed)
        self._loader = make_loader(dataset, self._sampler, workers=workers, pin_memory=device.type == "cuda", seed=seed)

    def __len__(self) -> int:
        """Steps in an epoch, the same on every rank."""
        return self._partition.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        epoch, samples = self.epoch, self._first_sample
        self._sampler.set_position(epoch, samples)
        self.epoch, self._first_sample = epoch + 1, 0
        batches = iter(self._loader)
        for step in self._partition.steps(samples):
            batch = next(batches) if step.micro_batches else empty_batch(self._dataset)
            self._under_way = (epoch, step.start + step.samples)
            yield to_device(batch, self._device, non_blocking=True)
        self._under_way = None

    def state_dict(self) -> dict[str, int]:
        """Return the position; the same on every rank."""
        epoch, samples = self._under_way or (self.epoch, self._first_sample)
        return {"epoch": epoch, "samples": samples}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration begin where `state_dict` was called.

        Raises:
            ConfigError: No global batch of this loader begins there.
        """
        self._partition.step_at(state["samples"])
        self.epoch, self._first_sample, self._under_way = state["epoch"], state["samples"], None
