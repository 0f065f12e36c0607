"""One rank's share of a data set: cut, ordered, loaded, and moved to its device.

`RankBatches` is the one chain from a data set to this rank's micro-batches; the training loop asks it for steps, people
who keep their own loop iterate over it. `evaluation_batches` is the same for evaluation, where ranks need not keep in
step. How shares are cut is `hvdtrain.data.partition`'s, in which order `hvdtrain.data.samplers`'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch.utils.data import DataLoader

from hvdtrain.data.loader import empty_batch, length_explained, make_loader, two_batches
from hvdtrain.data.nested import to_device
from hvdtrain.data.partition import BatchPartition, SamplePartition, Step
from hvdtrain.data.random_numbers import untouched_random_numbers
from hvdtrain.data.reach import Ranks, first_index, order_of, shard_for, whole_length
from hvdtrain.data.sample_count import SampleCount
from hvdtrain.data.samplers import EvalSampler, PartitionSampler
from hvdtrain.data.shards import Shard
from hvdtrain.data.shared_memory import check_shared_memory
from hvdtrain.data.source import Source
from hvdtrain.errors import ConfigError


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
        owner = self._owner
        for size in self.sizes:
            if size:
                with length_explained(owner.dataset):
                    batch = next(self._loaded)
            yield owner.on_device(batch if size else owner.empty), size


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
        partition: How the data is cut into steps.
        cut: How the data set is cut over the ranks, in words; what a position in an epoch means depends on it.
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
        global_batch_size = source.global_batch_size(global_batch_size, micro_batches=each)
        self.source = source
        self.dataset = source.dataset
        self._shard = shard = shard_for(source, ranks)
        self.cut = "batch" if shard is None else shard.cut
        self.partition = _partition(
            shard,
            length=whole_length(source, shard),
            global_batch_size=global_batch_size,
            world_size=topology.world_size,
            rank=topology.rank if shard is None else shard.place,
            accumulate=accumulate,
            last_batch=source.last_batch,
        )
        self.batch_size = -(-global_batch_size // each)
        if shard is not None and shard.sizes is not None:
            mine = -(-global_batch_size * shard.sizes[shard.place] // self.partition.length)
            self.batch_size = max(1, -(-mine // accumulate))
        self.epoch = 0
        self._first_sample = 0  # of the next iteration
        self._under_way: dict[str, Any] | None = None  # the position, while one is iterated over
        self._ranks = ranks
        self._seed = seed
        self._equal_passes = equal_passes
        self._empty: Any = None
        self._has_empty = False
        self._every_rank: bool | None = None
        self._first_index = first_index(source, shard, seed)
        check_shared_memory(
            source.dataset,
            batch_size=self.batch_size,
            workers=0 if self._first_index is None else source.workers,
            ranks=topology.local_world_size,
            index=self._first_index,
            prefetch_factor=source.prefetch_factor,
            worker_init=source.worker_init,
            multiprocessing_context=source.multiprocessing_context,
        )
        self._sampler = PartitionSampler(self.partition, shuffle=source.shuffle, seed=seed)
        self._loader = _loader(source, self._sampler, ranks, seed)

    def __len__(self) -> int:
        """Steps in an epoch, the same on every rank."""
        return self.partition.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's batches of the next epoch, one a step; of length 0 where it has no sample in one."""
        if self._every_rank is None:
            self._every_rank = self.partition.every_rank
        if not self._every_rank:
            self.prepare_empty()
        position = self._under_way = {"epoch": self.epoch, "samples": self._first_sample, "cut": self.cut}
        self.epoch, self._first_sample = self.epoch + 1, 0
        try:
            for step in self.steps(position["epoch"], position["samples"]):
                position["samples"] += step.samples
                yield from one_or_more(step, self)
        finally:  # also when the user breaks off: the next iteration is another epoch
            if self._under_way is position:
                self._under_way = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration begins, as one tells a DistributedSampler."""
        self.epoch, self._first_sample, self._under_way = epoch, 0, None

    def state_dict(self) -> dict[str, Any]:
        """Return the position, counted in samples over all ranks, the same on each; a batch that was handed out is done."""
        return dict(self._under_way or {"epoch": self.epoch, "samples": self._first_sample, "cut": self.cut})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration hand out what was left of the epoch when `state_dict` was called; that may be nothing.

        Raises:
            ConfigError: No global batch of this loader begins there, or the data was cut over the ranks in another way.
        """
        self.check_position(state["samples"], state.get("cut", "batch"))
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

    def example(self, epoch: int) -> Any:
        """Return a batch, on the device; None where not every rank has one. Every rank must call it."""
        if not self.partition.step(0).every_rank:
            return None
        with untouched_random_numbers():
            first, _ = next(iter(next(self.steps(0))))
        return first

    def state_of_this_rank(self) -> None:
        """Return what `take_up` needs of this rank: nothing."""

    def take_up(self, samples: int, cut: str, states: Sequence[Any]) -> None:
        """See whether an epoch can be taken up in its middle.

        Args:
            samples: Done of the epoch, over all ranks.
            cut: As `cut` was where the position comes from.
            states: What every rank's `state_of_this_rank` returned there.

        Raises:
            ConfigError: It cannot.
        """
        self.check_position(samples, cut)

    def check_position(self, samples: int, cut: str) -> None:
        """Refuse a position in an epoch that is none of this loader's.

        Args:
            samples: Done of the epoch, over all ranks.
            cut: As `cut` was where the position comes from.

        Raises:
            ConfigError: No global batch begins there, or other samples are done there than here.
        """
        step = self.partition.step_at(samples)
        if cut != self.cut and 0 < step < len(self):
            raise ConfigError(
                f"cannot continue after {samples} of {self.partition.samples_per_epoch} samples: which ones are done depends on how the "
                f"data set was cut, which was {cut!r} and is {self.cut!r} now. Continue with the partition= (--partition) and the "
                "ranks that the run began with, or from the end of an epoch"
            )

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
        order = order_of(source, self._shard, self._ranks, epoch=epoch, seed=self._seed, shuffle=source.shuffle)
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
            if self._shard is not None and not self._shard.smallest:
                raise ConfigError(
                    f"the data set has {self.partition.length} samples for {self.partition.world_size} ranks, and with "
                    f"partition={source.partition!r} some rank has none of its own to make an empty batch from, which it needs to keep "
                    "in step; see that every rank has a sample, or use partition='batch' (--partition batch) or fewer ranks"
                )
            self._empty = empty_batch(source.dataset, **_how(source, self._first_index))
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


class _Empties(Protocol):
    @property
    def empty(self) -> Any: ...

    def on_device(self, batch: Any) -> Any: ...


def one_or_more(step: Iterable[tuple[Any, int]], owner: _Empties) -> Iterator[Any]:
    """Yield a step's batches for a loop of the user's; one of length 0 where this rank has no sample in it."""
    none = True
    for batch, _ in step:
        none = False
        yield batch
    if none:
        yield owner.on_device(owner.empty)


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
    topology, shard = ranks.topology, shard_for(source, ranks)
    sampler = EvalSampler(
        whole_length(source, shard),
        batch_size=batch_size,
        world_size=topology.world_size,
        rank=topology.rank,
        order=order_of(source, shard, ranks, epoch=0, seed=seed, shuffle=False),
        positions=None if shard is None else shard.positions,
    )
    loaded = iter(_loader(source, sampler, ranks, seed))
    for indices in sampler:
        with length_explained(source.dataset):
            batch = next(loaded)
        yield to_device(batch, ranks.device, non_blocking=True), len(indices)


def equal_evaluation_batches(source: Source, ranks: Ranks, *, batch_size: int, seed: int = 0) -> RankBatches:
    """Return the same for ranks that must make equally many batches: one step, in whose micro-batches the samples are.

    A rank has batches without samples only where it has fewer samples than another has batches.
    """
    shard = shard_for(source, ranks)
    length = whole_length(source, shard)
    sizes = None if shard is None else shard.sizes
    most = -(-length // ranks.topology.world_size) if sizes is None else max(sizes)
    return RankBatches(
        replace(source, shuffle=False, last_batch="keep"),
        ranks,
        global_batch_size=length,
        accumulate=max(1, -(-most // batch_size)),
        seed=seed,
        equal_passes=True,
    )


def sample_count(source: Source, ranks: Ranks, *, seed: int) -> SampleCount | None:
    """Return what counts the samples of a batch, which a collate function or a data set of the user's may have dropped.

    None where nothing can be dropped, or nothing be seen.
    """
    if source.is_stream or (source.collate is None and not hasattr(source.dataset, "__getitems__")):
        return None
    shard = shard_for(source, ranks)
    index = first_index(source, shard, seed) if source.length else None
    if index is None:
        return None
    try:
        return SampleCount(*two_batches(source.dataset, **_how(source, index)))
    except Exception:  # a collate function need not take the same sample twice; what fails on any fails in training
        return None


def _partition(shard: Shard | None, **how: Any) -> BatchPartition:
    return BatchPartition(**how) if shard is None else SamplePartition(sizes=shard.sizes, **how)


def _how(source: Source, index: Any) -> dict[str, Any]:
    """For `hvdtrain.data.loader.two_batches`."""
    return {
        "collate": source.collate,
        "index": index,
        "workers": source.workers,
        "worker_init": source.worker_init,
        "multiprocessing_context": source.multiprocessing_context,
    }


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
