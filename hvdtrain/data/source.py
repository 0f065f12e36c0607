"""What is loaded, in which order, and how: said by arguments, or read off a user's own `torch.utils.data.DataLoader`.

A user's loader is not iterated: what it says is taken over, and the batches are cut over the ranks by
`hvdtrain.data.rank_batches`. Not taken over are its random numbers. Its ``generator``, and the seed of a
DistributedSampler, play no part: the order follows from the run's seed and the epoch, so that it is the same on every
rank and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from hvdtrain.data.loader import check_indexable
from hvdtrain.data.random_numbers import seed_process, untouched_random_numbers
from hvdtrain.data.shards import check_partition
from hvdtrain.data.streams import check_repeatable, is_stream, name_of
from hvdtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Samples and how to load them, before anything is cut over ranks.

    Attributes:
        dataset: With ``__len__`` and ``__getitem__``; or a stream (see `hvdtrain.data.streams.is_stream`).
        batch_size: Samples per rank and batch; None where nobody said.
        shuffle: A new order each epoch.
        sampler: Gives the order of each epoch instead: data set indices for all ranks together.
        last_batch: See `hvdtrain.data.partition.BatchPartition`.
        partition: How the data set is cut over the ranks, see `hvdtrain.data.shards`.
        collate: As for `torch.utils.data.DataLoader`; None for its default.
        workers: Loader processes per rank.
        pin_memory: None for what suits the device.
        persistent_workers: None for yes.
        timeout_s: Longest wait for a batch from a loader process; None for the backend's.
        worker_init: See `hvdtrain.data.loader.make_loader`, as the two below.
        prefetch_factor: Batches ahead.
        multiprocessing_context: How loader processes begin.
    """

    dataset: Any
    batch_size: int | None = None
    shuffle: bool = False
    sampler: Iterable[Any] | None = None
    last_batch: str = "keep"
    partition: str = "batch"
    collate: Callable[[list[Any]], Any] | None = None
    workers: int = 0
    pin_memory: bool | None = None
    persistent_workers: bool | None = None
    timeout_s: float | None = None
    worker_init: Callable[[int], None] | None = None
    prefetch_factor: int | None = None
    multiprocessing_context: Any = None

    def __post_init__(self) -> None:
        if self.is_stream:
            self._check_stream()
        else:
            check_indexable(self.dataset)
        check_partition(self.partition, sampler=self.sampler)
        if self.sampler is not None and self.shuffle:
            raise ConfigError("shuffle=True and sampler= exclude each other: the sampler gives the order")
        cut = getattr(self.sampler, "num_replicas", 1)
        if isinstance(cut, int) and cut > 1:
            raise ConfigError(
                f"the sampler, a {type(self.sampler).__name__}, already cuts the data into {cut} parts (num_replicas), and hvdtrain "
                "cuts it over the ranks again; give the sampler that orders the whole data set, or shuffle=True"
            )

    @property
    def is_stream(self) -> bool:
        """Whether the samples are read from the first to the last, and have no numbers."""
        return is_stream(self.dataset)

    def _check_stream(self) -> None:
        check_repeatable(self.dataset)
        said = f"{name_of(self.dataset)} is a stream, which is read in its own order to its end"
        if self.shuffle or self.sampler is not None:
            what = "shuffle=True" if self.shuffle else "sampler="
            raise ConfigError(
                f"{said}: {what} has no effect; let the stream itself shuffle (its files, or a buffer of samples)"
            )
        if self.last_batch != "keep":
            raise ConfigError(
                f"{said}, of unknown length: last_batch={self.last_batch!r} (drop_last, --last-batch) does not go with it; leave it out"
            )
        if self.partition != "batch":
            raise ConfigError(
                f"{said}, and is not cut by numbers: partition={self.partition!r} (--partition) does not go with it. A method "
                "shard(num_shards, index) of the stream lets each rank read its own part"
            )

    @property
    def length(self) -> int:
        """Samples in an epoch over all ranks; with "sample-own" of this rank alone."""
        if self.sampler is None:
            return len(self.dataset)
        return len(self.sampler) if isinstance(self.sampler, Sized) else len(self.order(0, seed=0))

    def global_batch_size(self, given: int | None, *, micro_batches: int) -> int:
        """Return the samples per step over all ranks.

        Args:
            given: That number, if somebody said it; else it follows from the batch size.
            micro_batches: Of a step, over all ranks.

        Raises:
            ConfigError: Nobody said either.
        """
        if given is not None:
            return given
        if self.batch_size is None:
            raise ConfigError("give either batch_size (per rank and micro-batch) or global_batch_size")
        return self.batch_size * micro_batches

    def order(self, epoch: int, *, seed: int) -> Sequence[Any]:
        """Return the indices that the sampler gives for an epoch.

        The sampler draws random numbers that depend on ``seed`` and ``epoch`` alone, from the process's generators and
        from its own ``generator`` if it has one: so it gives the same on every rank and after a resume. All generators
        are afterwards as before. A sampler with ``set_epoch`` is told the epoch.

        Raises:
            ConfigError: It gives no indices, or another number of them than its length says.
        """
        assert self.sampler is not None
        if callable(getattr(self.sampler, "set_epoch", None)):
            self.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        own: Any = getattr(self.sampler, "generator", None)
        state = own.get_state() if isinstance(own, torch.Generator) else None
        with untouched_random_numbers():
            seed_process(seed, 3, epoch)
            try:
                if state is not None:
                    own.manual_seed((own.initial_seed() + int(torch.randint(2**62, ()))) % 2**63)
                indices = [index.item() if isinstance(index, torch.Tensor) else index for index in self.sampler]
            finally:
                if state is not None:
                    own.set_state(state)
        expected = len(self.sampler) if isinstance(self.sampler, Sized) else len(indices)
        if not indices or len(indices) != expected:
            raise ConfigError(
                f"the sampler, a {type(self.sampler).__name__}, gave {len(indices)} indices for epoch {epoch + 1}, and its length "
                f"is {expected}; it must give as many in every epoch, and at least one"
            )
        return indices


def source_of(
    data: Any,
    *,
    batch_size: int | None = None,
    shuffle: bool | None = None,
    sampler: Iterable[Any] | None = None,
    last_batch: str = "keep",
    drop_last: bool = False,
    partition: str | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    workers: int = 0,
    pin_memory: bool | None = None,
    persistent_workers: bool | None = None,
) -> Source:
    """Join what arguments say with what the user's own loader says; an argument that was given goes before the loader.

    Args:
        data: A data set, a `DataLoader`, or a `Source`.
        batch_size: See `Source`, as for all but ``drop_last``.
        shuffle: None for what the loader does; no for a data set.
        sampler: None for the loader's.
        last_batch: "keep" for what the loader does with its ``drop_last``.
        drop_last: DataLoader's word for ``last_batch="drop"``.
        partition: None for "batch", or what a `Source` says.
        collate: None for the loader's.
        workers: 0 for the loader's.
        pin_memory: None for the loader's.
        persistent_workers: None for the loader's.

    Raises:
        ConfigError: The arguments exclude each other, or the data cannot be cut.
    """
    if drop_last:
        if last_batch == "merge":
            raise ConfigError("drop_last=True and last_batch='merge' exclude each other")
        last_batch = "drop"
    said = data if isinstance(data, Source) else _read(data) if isinstance(data, DataLoader) else Source(dataset=data)
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "shuffle": shuffle,
        "sampler": sampler,
        "last_batch": None if last_batch == "keep" else last_batch,
        "partition": partition,
        "collate": collate,
        "workers": workers or None,
        "pin_memory": pin_memory,
        "persistent_workers": persistent_workers,
    }
    if sampler is not None and shuffle is None:
        given["shuffle"] = False
    return replace(said, **{name: value for name, value in given.items() if value is not None})


def _read(loader: DataLoader[Any]) -> Source:
    """What a user's loader says of itself."""
    if isinstance(loader.dataset, IterableDataset):
        return _read_stream(loader)
    check_indexable(loader.dataset)
    batches: Any = loader.batch_sampler
    if type(batches) is not BatchSampler:
        why = (
            f"its batches are made by a {type(batches).__name__} of your own, which hvdtrain cannot cut over the ranks"
            if batches is not None
            else "it has batch_size=None, so that its data set makes whole batches, which hvdtrain cannot cut over the ranks"
        )
        raise ConfigError(
            f"{why}; make the loader with batch_size= (and sampler=, if the order is your own), or pass the data set itself"
        )
    order: Any = batches.sampler
    sampler: Any = None
    if type(order) is DistributedSampler:  # this loader's rank has its share: take the whole, and cut that
        shuffle = order.shuffle
    else:
        whole = type(order) is RandomSampler and not order.replacement and order.num_samples == len(loader.dataset)  # type: ignore[arg-type]
        shuffle = whole
        sampler = None if whole or type(order) is SequentialSampler else order
    return Source(
        dataset=loader.dataset,
        batch_size=batches.batch_size,
        shuffle=shuffle,
        sampler=sampler,
        last_batch="drop" if batches.drop_last else "keep",
        **_how(loader),
    )


def _read_stream(loader: DataLoader[Any]) -> Source:
    """What a user's loader says of itself and the stream that it reads."""
    if loader.batch_size is None:
        raise ConfigError(
            "it has batch_size=None, so that its stream makes whole batches, which hvdtrain cannot cut over the ranks; make the "
            "loader with batch_size= and let the stream yield samples, or pass the stream itself"
        )
    last_batch = "drop" if loader.drop_last else "keep"
    return Source(dataset=loader.dataset, batch_size=loader.batch_size, last_batch=last_batch, **_how(loader))


def _how(loader: DataLoader[Any]) -> dict[str, Any]:
    """How a user's loader loads."""
    return {
        "collate": None if loader.collate_fn is default_collate else loader.collate_fn,
        "workers": loader.num_workers,
        "pin_memory": loader.pin_memory or None,
        "persistent_workers": loader.persistent_workers if loader.num_workers else None,
        "timeout_s": loader.timeout or None,
        "worker_init": loader.worker_init_fn,
        "prefetch_factor": loader.prefetch_factor,
        "multiprocessing_context": loader.multiprocessing_context,
    }
