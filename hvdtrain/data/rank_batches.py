"""One rank's share of a data set: cut, ordered, loaded, and moved to its device.

`RankBatches` is the one chain from a data set to this rank's micro-batches; the training loop asks it for steps, people
who keep their own loop iterate over it. `evaluation_batches` is the same for evaluation, where ranks need not keep in
step. How shares are cut is `hvdtrain.data.partition`'s, in which order `hvdtrain.data.samplers`'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from hvdtrain.data.loader import empty_batch, make_loader
from hvdtrain.data.nested import to_device
from hvdtrain.data.partition import BatchPartition, Step
from hvdtrain.data.random_numbers import untouched_random_numbers
from hvdtrain.data.samplers import EvalSampler, PartitionSampler
from hvdtrain.data.shared_memory import check_shared_memory
from hvdtrain.data.source import Source
from hvdtrain.errors import ConfigError
from hvdtrain.topology import Topology


class Ranks(Protocol):
    """What is asked of a backend here."""

    topology: Topology
    device: torch.device
    timeout_s: float

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return every rank's object, in the order of the ranks."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RankStep:
    """One global batch, as this rank sees it. Iterate once: each micro-batch is loaded when it is asked for.

    Attributes:
        samples: Of the global batch, over all ranks.
        sizes: Samples of each of this rank's micro-batches; 0 for one that only keeps the ranks in step.
    """

    samples: int
    sizes: tuple[int, ...]
    _owner: RankBatches
    _loaded: Iterator[Any]

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Yield the micro-batches, on the device, each with the number of its samples."""
        for size in self.sizes:
            yield self._owner.on_device(next(self._loaded) if size else self._owner.empty), size


class RankBatches:
    """Iterate over it once per epoch for this rank's batches on its device; see `hvdtrain.backends.base.Backend.loader`.

    Args:
        source: What is loaded, and how.
        ranks: All of them; a running backend.
        global_batch_size: Samples per step over all ranks; else ``source.batch_size`` for each rank and micro-batch.
        accumulate: Micro-batches that a rank's share is cut into.
        seed: Of the order, and of random numbers in loader processes.
        equal_passes: Every rank gets as many micro-batches as the others, if need be empty ones.

    Attributes:
        source: As given.
        dataset: The data set.
        batch_size: Samples per rank and micro-batch; where a share is shorter, or longer by a merged last batch, it has
            as many as it has.
        partition: How the data is cut.
        epoch: The epoch that the next iteration begins; set it to continue an earlier run.

    Raises:
        ConfigError: A value that cannot work, or loader processes that have no room.
    """

    def __init__(
        self,
        source: Source,
        ranks: Ranks,
        *,
        global_batch_size: int | None = None,
        accumulate: int = 1,
        seed: int = 0,
        equal_passes: bool = False,
    ) -> None:
        topology = ranks.topology
        each = topology.world_size * accumulate
        if global_batch_size is None:
            if source.batch_size is None:
                raise ConfigError("give either batch_size (per rank and micro-batch) or global_batch_size")
            global_batch_size = source.batch_size * each
        self.source = source
        self.dataset = source.dataset
        self.partition = BatchPartition(
            length=source.length,
            global_batch_size=global_batch_size,
            world_size=topology.world_size,
            rank=topology.rank,
            accumulate=accumulate,
            last_batch=source.last_batch,
        )
        self.batch_size = -(-global_batch_size // each)
        self.epoch = 0
        self._first_sample = 0  # of the next iteration
        self._under_way: dict[str, int] | None = None  # the position, while one is iterated over
        self._ranks = ranks
        self._seed = seed
        self._equal_passes = equal_passes
        self._empty: Any = None
        self._has_empty = False
        self._first_index = 0 if source.sampler is None else source.order(0, seed=seed)[0]
        check_shared_memory(
            source.dataset,
            batch_size=self.batch_size,
            workers=source.workers,
            ranks=topology.local_world_size,
            index=self._first_index,
            prefetch_factor=source.prefetch_factor,
            worker_init=source.worker_init,
            multiprocessing_context=source.multiprocessing_context,
        )
        self._sampler = PartitionSampler(self.partition, shuffle=source.shuffle, seed=seed)
        self._loader = _loader(source, self._sampler, ranks, seed)
        if equal_passes and self.partition.needs_empty_batches:
            self.prepare_empty()

    def __len__(self) -> int:
        """Steps in an epoch, the same on every rank."""
        return self.partition.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's batches of the next epoch, one a step; of length 0 where it has no sample in one."""
        if not self.partition.step(len(self) - 1).every_rank:
            self.prepare_empty()
        position = self._under_way = {"epoch": self.epoch, "samples": self._first_sample}
        self.epoch, self._first_sample = self.epoch + 1, 0
        try:
            for step in self.steps(position["epoch"], position["samples"]):
                position["samples"] += step.samples
                if not step.sizes:
                    yield self.on_device(self.empty)
                for batch, _ in step:
                    yield batch
        finally:  # also when the user breaks off: the next iteration is another epoch
            if self._under_way is position:
                self._under_way = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration begins, as one tells a DistributedSampler."""
        self.epoch, self._first_sample, self._under_way = epoch, 0, None

    def state_dict(self) -> dict[str, int]:
        """Return the position, counted in samples over all ranks, the same on each; a batch that was handed out is done."""
        return dict(self._under_way or {"epoch": self.epoch, "samples": self._first_sample})

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration hand out what was left of the epoch when `state_dict` was called; that may be nothing.

        Raises:
            ConfigError: No global batch of this loader begins there.
        """
        self.partition.step_at(state["samples"])
        self.epoch, self._first_sample, self._under_way = state["epoch"], state["samples"], None

    @property
    def global_batch_size(self) -> int:
        """Samples per step over all ranks; the last step of an epoch may have fewer, or more."""
        return self.partition.global_batch_size

    def steps_in(self, epochs: int) -> float:
        """Return the steps of so many epochs."""
        return epochs * len(self)

    def is_over(self, samples: int) -> bool:
        """Whether an epoch has no samples left after so many, over all ranks."""
        return samples >= self.partition.samples_per_epoch

    def go_on(self, samples: int, states: Sequence[Any]) -> None:
        """See whether an epoch can be taken up.

        Args:
            samples: Of it that are done, over all ranks.
            states: What every rank's `state_of_this_rank` returned then.

        Raises:
            ConfigError: It cannot.
        """
        if samples and any(state is not None for state in states):
            raise ConfigError("it was reading a stream, and this is a data set with numbers; give the same data")
        self.partition.step_at(samples)

    def state_of_this_rank(self) -> None:
        """Return what `go_on` needs of this rank: nothing."""

    def example(self) -> Any:
        """Return a batch, on the device; None where not every rank has one. Every rank must call it."""
        if not self.partition.step(0).every_rank:
            return None
        with untouched_random_numbers():
            first, _ = next(iter(next(self.steps(0))))
        return first

    def steps(self, epoch: int, start_sample: int = 0) -> Iterator[RankStep]:
        """Yield this rank's steps from a position in an epoch to its end.

        With a sampler of the user's every rank must call it: the ranks compare their orders.

        Args:
            epoch: Epochs completed.
            start_sample: Samples of this epoch that are done, over all ranks.

        Raises:
            ConfigError: No global batch begins there, or the sampler gives the ranks different orders.
        """
        source = self.source
        order = None if source.sampler is None else agreed_order(source, self._ranks, epoch, self._seed)
        self._sampler.set_position(epoch, start_sample, order)
        loaded = iter(self._loader)
        for step in self.partition.steps(start_sample):
            yield RankStep(
                samples=step.samples,
                sizes=self._sizes(step),
                _owner=self,
                _loaded=loaded,
            )

    def prepare_empty(self) -> None:
        """Make the empty batch now, where one will be needed; every rank finds out alike whether it can be made.

        Raises:
            ConfigError: The batches do not show what an empty one would be.
        """
        if not self._has_empty:
            source = self.source
            self._empty = empty_batch(
                source.dataset,
                collate=source.collate,
                index=self._first_index,
                workers=source.workers,
                worker_init=source.worker_init,
                multiprocessing_context=source.multiprocessing_context,
            )
            self._has_empty = True

    @property
    def empty(self) -> Any:
        """A batch without samples, not yet on the device."""
        self.prepare_empty()
        return self._empty

    def on_device(self, batch: Any) -> Any:
        """Return a batch on this rank's device."""
        return to_device(batch, self._ranks.device, non_blocking=True)

    def _sizes(self, step: Step) -> tuple[int, ...]:
        sizes = tuple(len(positions) for positions in step.micro_batches)
        return sizes + (0,) * (step.passes - len(sizes)) if self._equal_passes else sizes


def evaluation_batches(source: Source, ranks: Ranks, *, batch_size: int, seed: int = 0) -> Iterator[tuple[Any, int]]:
    """Yield this rank's share of a data set in batches on its device, each with the number of its samples.

    Each sample is in one batch of one rank. A rank may have none at all.

    Args:
        source: What is loaded, and how; its batch size, shuffle and last batch play no part.
        ranks: All of them.
        batch_size: Samples per rank and batch.
        seed: Of random numbers in loader processes.

    Raises:
        ConfigError: A value that cannot work, or the source's sampler gives the ranks different orders.
    """
    topology = ranks.topology
    sampler = EvalSampler(
        source.length,
        batch_size=batch_size,
        world_size=topology.world_size,
        rank=topology.rank,
        order=None if source.sampler is None else agreed_order(source, ranks, 0, seed),
    )
    for indices, batch in zip(sampler, _loader(source, sampler, ranks, seed), strict=True):
        yield to_device(batch, ranks.device, non_blocking=True), len(indices)


def agreed_order(source: Source, ranks: Ranks, epoch: int, seed: int) -> Sequence[Any]:
    """Return the order that the source's sampler gives for an epoch, which must be the same on every rank.

    Raises:
        ConfigError: It is not; names the ranks.
    """
    order = source.order(epoch, seed=seed)
    if ranks.topology.world_size > 1:
        digest = hashlib.blake2b(repr(order).encode(), digest_size=16).hexdigest()
        found = ranks.all_gather_object((len(order), digest))
        differing = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
        if differing:
            raise ConfigError(
                f"the sampler, a {type(source.sampler).__name__}, gives rank{'s' if len(differing) > 1 else ''} "
                f"{', '.join(map(str, differing))} another order than rank 0 in epoch {epoch + 1}. It must give every rank the "
                "same order of the whole data set, which hvdtrain cuts: do not let it depend on the rank, and seed its "
                "generator alike everywhere"
            )
    return order


def _loader(source: Source, sampler: PartitionSampler | EvalSampler, ranks: Ranks, seed: int) -> DataLoader[Any]:
    return make_loader(
        source.dataset,
        sampler,
        workers=source.workers,
        pin_memory=ranks.device.type == "cuda" if source.pin_memory is None else source.pin_memory,
        seed=seed,
        timeout_s=ranks.timeout_s if source.timeout_s is None else source.timeout_s,
        collate=source.collate,
        persistent_workers=source.persistent_workers is not False,
        worker_init=source.worker_init,
        prefetch_factor=source.prefetch_factor,
        multiprocessing_context=source.multiprocessing_context,
    )
