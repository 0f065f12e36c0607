"""One rank's share of a stream, in steps: the counterpart of `hvdtrain.data.rank_batches` for data of unknown length.

Each sample is in one batch of one rank, ranks may have any number of samples, and none waits for one that is done: before
each step all ranks know how many samples it has over all of them, and the epoch ends where that is none. They learn it
one step ahead, along with the gradients of the step before (`hvdtrain.backends.ahead`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hvdtrain.data.nested import empty_from, to_device
from hvdtrain.data.portions import Cut, Opening, Portion, Start
from hvdtrain.data.rank_batches import RankBatches, equal_evaluation_batches, evaluation_batches, one_or_more
from hvdtrain.data.reach import Ranks
from hvdtrain.data.source import Source
from hvdtrain.data.stream_place import Place
from hvdtrain.data.stream_reading import Reading, other_streams
from hvdtrain.data.streams import STRIDE, name_of, way_of
from hvdtrain.errors import ConfigError, DataError

_log = logging.getLogger(__name__)


class Total(Protocol):
    """A sum over the ranks that is not waited for."""

    def total(self) -> int:
        """Return it; every rank must call it."""
        ...


class StreamRanks(Ranks, Protocol):
    """What is asked of a backend here."""

    def ahead(self, number: int) -> Total:
        """Begin to sum a number over the ranks."""
        ...

    def all_reduce(self, tensor: Tensor, op: Any = "sum") -> Tensor:
        """Reduce a tensor over the ranks."""
        ...

    def broadcast_object(self, obj: Any, src: int = 0) -> Any:
        """Give every rank rank ``src``'s object."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamStep:
    """One global batch, as this rank sees it.

    Attributes:
        samples: Of the global batch, over all ranks.
        sizes: Samples of each of this rank's micro-batches; 0 for one that only keeps the ranks in step.
    """

    samples: int
    sizes: tuple[int, ...]
    _owner: RankStream
    _batches: tuple[Any, ...]

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        """Yield the micro-batches, on the device, each with the number of its samples."""
        for number, size in enumerate(self.sizes):
            yield self._owner.on_device(self._batches[number] if size else self._owner.empty), size


class RankStream:
    """Iterate over it once per epoch for this rank's batches on its device; see `hvdtrain.backends.base.Backend.loader`.

    Args:
        source: What is read, and how.
        ranks: All of them; a running backend.
        global_batch_size: Samples per step over all ranks; else ``source.batch_size`` for each rank and micro-batch.
        accumulate: Micro-batches that a rank's share is cut into.
        seed: Of random numbers that the stream draws.
        equal_passes: Every rank gets as many micro-batches as the others, if need be empty ones.
        keep_states: Note where the stream is, if it can say that, after each step: for `state_dict`.
        count: Refuse a batch that has fewer samples than it was made of, as far as that shows.

    Attributes:
        source: As given.
        dataset: The stream.
        batch_size: Samples per rank and micro-batch.
        global_batch_size: Samples per step over all ranks.
        epoch: The epoch that the next iteration begins.
        cut: "stream".

    Raises:
        ConfigError: A value that cannot work.
    """

    def __init__(
        self,
        source: Source,
        ranks: StreamRanks,
        *,
        global_batch_size: int | None = None,
        accumulate: int = 1,
        seed: int = 0,
        equal_passes: bool = False,
        keep_states: bool = True,
        count: bool = False,
    ) -> None:
        topology = ranks.topology
        each = topology.world_size * accumulate
        global_batch_size = source.global_batch_size(global_batch_size, micro_batches=each)
        way = way_of(source.dataset)
        self._whole = way == STRIDE
        if global_batch_size < (1 if self._whole else topology.world_size):
            raise ConfigError(
                f"a global batch of {global_batch_size} leaves nothing for some of {topology.world_size} ranks, whose part of the "
                "stream would never be read; use a larger one"
                if global_batch_size > 0
                else f"global_batch_size must be at least 1, got {global_batch_size}"
            )
        self.source = source
        self.dataset = source.dataset
        self.global_batch_size = global_batch_size
        self.batch_size = -(-global_batch_size // each)
        self.epoch = 0
        self.cut = "stream"
        self._ranks = ranks
        self._seed = seed
        self._equal_passes = equal_passes
        self._keep_states = keep_states
        self._count = count
        self._cut = Cut(
            global_batch_size=global_batch_size,
            accumulate=accumulate,
            rank=topology.rank,
            world_size=topology.world_size,
            workers=source.workers,
        )
        self._place = Place(self._cut)  # where the next iteration begins, and later where the current one is
        self._next_samples: Total | None = None  # of the step after this one
        self._opened: tuple[Reading, Portion | None] | None = None  # read in advance
        self._empty: Any = None
        self._cannot_be_empty: str | None = None
        if topology.world_size > 1 and topology.rank == 0:
            _log.info("%s is read by %d ranks: %s", name_of(source.dataset), topology.world_size, way)

    def __iter__(self) -> Iterator[Any]:
        """Yield this rank's batches of the next epoch, one a step; of length 0 where it has no sample in one."""
        self._begin(self.epoch)
        place = self._place
        self.epoch += 1
        try:
            for step in self._steps(show_pair=True):
                yield from one_or_more(step, self)
        finally:  # also when the user breaks off: the next iteration is another epoch
            if self._place is place:
                self._place = Place(self._cut, self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration begins, as one tells a DistributedSampler."""
        self.epoch, self._place = epoch, Place(self._cut, epoch)

    def steps(self, epoch: int, start_sample: int = 0) -> Iterator[StreamStep]:
        """Yield this rank's steps of an epoch, from its beginning or from where `load_state_dict` has set it; every rank must.

        Args:
            epoch: Epochs completed.
            start_sample: Samples of this epoch that are done, over all ranks.

        Raises:
            ConfigError: The ranks do not read the same, or the stream is empty on all of them.
        """
        self._begin(epoch)
        assert start_sample == self._place.samples, "set by load_state_dict"
        return self._steps(show_pair=self._equal_passes)

    def steps_in(self, epochs: int) -> float:
        """Return the steps of so many epochs: infinity, as long as nobody knows."""
        return math.inf if epochs else 0

    def is_over(self, samples: int) -> bool:
        """Whether the epoch that is read has no samples left after so many, over all ranks; every rank must call it."""
        if self._next_samples is not None and self._next_samples.total() == 0:
            self._place.over = True
        return self._place.over and samples == self._place.samples

    def take_up(self, samples: int, cut: str, states: Sequence[Any]) -> None:
        """Take up an epoch in its middle, as `load_state_dict` does.

        Args:
            samples: Done of the epoch, over all ranks.
            cut: As `cut` was where the position comes from.
            states: What every rank's `state_of_this_rank` returned there.

        Raises:
            ConfigError: It cannot be taken up.
        """
        if not samples:
            return
        if cut != self.cut or not states:
            raise ConfigError(
                f"cannot continue after {samples} samples: they were read from other data than a stream; give the same data"
            )
        self.load_state_dict({"ranks": states})

    def example(self, epoch: int) -> Any:
        """Return the batch, on the device, that the epoch begins with, or goes on; None where not every rank has one.

        Every rank must call it. Nothing is lost: the next step has it again.
        """
        self._begin(epoch)
        self._place.keep()
        if self._place.over:
            return None
        self._opened = self._opened or self._open(show_pair=self._equal_passes)
        portion = self._opened[1]
        has = self._ranks.all_gather_object(portion is not None and portion.samples > 0)
        return self.on_device(portion.batches[0]) if portion is not None and all(has) else None

    @property
    def empty(self) -> Any:
        """A batch without samples, not yet on the device."""
        if self._cannot_be_empty is None:
            raise ConfigError("no batch has been read yet, so that none without samples can be made")
        if self._cannot_be_empty:
            raise ConfigError(self._cannot_be_empty)
        return self._empty

    def on_device(self, batch: Any) -> Any:
        """Return a batch on this rank's device."""
        return to_device(batch, self._ranks.device, non_blocking=True)

    # -- position -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream, of all ranks; every rank must call it. A batch that was handed out is done."""
        return {"ranks": self._ranks.all_gather_object(self.state_of_this_rank())}

    def state_of_this_rank(self) -> dict[str, Any]:
        """Return this rank's part of `state_dict`; every rank must call it."""
        self.is_over(self._place.samples)
        return self._place.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration hand out what was left of the epoch when `state_dict` was called; that may be nothing.

        Raises:
            ConfigError: The stream cannot be gone on with by this number of ranks or loader processes, or in these batches.
        """
        self._place = place = Place(self._cut)
        place.take_up(state["ranks"], whole=self._whole)
        self.epoch, self._next_samples, self._opened = place.epoch, None, None
        if place.again and self._ranks.topology.rank == 0:
            _log.info(
                "%s cannot say where it was: it is read again from the beginning of epoch %d, and %d samples are left out",
                name_of(self.dataset),
                place.epoch + 1,
                place.samples,
            )

    # -- inside -------------------------------------------------------------------------------------------------------

    def _begin(self, epoch: int) -> None:
        """Begin an epoch anew, unless a place in this one was taken up."""
        if not self._place.take(epoch):
            self._place, self._opened = Place(self._cut, epoch), None

    def _open(self, *, show_pair: bool) -> tuple[Reading, Portion | None]:
        """Begin to read at this place."""
        show_pair &= self._cannot_be_empty is None
        reading = Reading(
            self.source,
            self._ranks,
            self._cut,
            seed=self._seed,
            start=self._place.start(whole=self._whole),
            keep_states=self._keep_states,
            show_pair=show_pair,
            count=self._count,
        )
        if show_pair:
            self._make_empty(reading.openings)
        return reading, reading.next()

    def _steps(self, *, show_pair: bool) -> Iterator[StreamStep]:
        place, ranks = self._place, self._ranks
        if place.over:
            place.finish()
            return
        none_yet = place.samples == 0
        reading, portion = self._opened or self._open(show_pair=show_pair)
        self._opened = None
        ahead = ranks.ahead(0 if portion is None else portion.samples)
        while samples := ahead.total():
            following = reading.next()
            step = self._step(portion, samples)
            self._next_samples = ahead = ranks.ahead(0 if following is None else following.samples)
            place.advance(portion, samples, reading.ended)
            yield step
            none_yet, portion = False, following
        if none_yet:
            raise ConfigError(f"{name_of(self.dataset)} yielded no sample on any rank in epoch {place.epoch + 1}")
        self._next_samples = None
        place.finish()

    def _step(self, portion: Portion | None, samples: int) -> StreamStep:
        if self._whole and samples != (0 if portion is None else portion.total):
            where = f"in epoch {self._place.epoch + 1}, after {self._place.samples} samples, more are left on some ranks than on others"
            raise DataError(other_streams(self.dataset, where))
        batches, sizes = ((), ()) if portion is None else (portion.batches, portion.sizes)
        if self._equal_passes:
            sizes += (0,) * (self._passes(samples, len(sizes)) - len(sizes))
        return StreamStep(samples=samples, sizes=sizes, _owner=self, _batches=batches)

    def _passes(self, samples: int, mine: int) -> int:
        """Micro-batches of the rank that has most in a step."""
        if self._whole or self._cut.accumulate == 1:
            return self._cut.passes(samples)
        return int(self._ranks.all_reduce(torch.tensor(mine), "max"))

    def _make_empty(self, openings: list[Opening]) -> None:
        """Make the batch without samples; a rank that has none to make it from gets another rank's."""
        pair = next((opening.pair for opening in openings if opening.pair is not None), None)
        problem = ""
        if pair is not None:
            try:
                self._empty = empty_from(*pair)
            except ConfigError as error:
                problem = str(error)
        made = self._ranks.all_gather_object((pair is not None, problem))
        self._cannot_be_empty = next((theirs for _, theirs in made if theirs), "")
        if self._cannot_be_empty or all(has for has, _ in made) or not any(has for has, _ in made):
            return
        theirs = self._ranks.broadcast_object(self._empty, src=[has for has, _ in made].index(True))
        self._empty = self._empty if pair is not None else theirs


Batches = RankBatches | RankStream


def batches_of(
    source: Source,
    ranks: StreamRanks,
    *,
    equal_passes: bool = False,
    keep_states: bool = True,
    count: bool = False,
    **options: Any,
) -> Batches:
    """Return this rank's share of a data set or a stream.

    Args:
        source: What is loaded, and how.
        ranks: All of them.
        equal_passes: Every rank gets as many micro-batches as the others, if need be empty ones; what those look like is
            found out at once where it can be.
        keep_states, count: See `RankStream`; of a data set they play no part.
        options: As both have them.
    """
    if source.is_stream:
        return RankStream(source, ranks, equal_passes=equal_passes, keep_states=keep_states, count=count, **options)
    batches = RankBatches(source, ranks, equal_passes=equal_passes, **options)
    if equal_passes and batches.partition.needs_empty_batches:
        batches.prepare_empty()
    return batches


def evaluation_of(
    source: Source,
    ranks: StreamRanks,
    *,
    batch_size: int,
    seed: int = 0,
    count: bool = False,
    equal_passes: bool = False,
) -> Iterator[tuple[Any, int]]:
    """Yield this rank's share of a data set or a stream, as `evaluation_batches` does; every rank must begin it.

    Args:
        source, batch_size, seed: As there.
        ranks: All of them.
        count: See `RankStream`.
        equal_passes: Every rank gets as many batches as the others, if need be empty ones.
    """
    if equal_passes:
        each = replace(source, batch_size=batch_size)
        together: Batches
        if source.is_stream:
            together = RankStream(each, ranks, seed=seed, equal_passes=True, keep_states=False, count=count)
        else:
            together = equal_evaluation_batches(source, ranks, batch_size=batch_size, seed=seed)
            if together.partition.needs_empty_batches:
                together.prepare_empty()
        for step in together.steps(0):
            yield from step
        return
    if not source.is_stream:
        yield from evaluation_batches(source, ranks, batch_size=batch_size, seed=seed)
        return
    topology = ranks.topology
    cut = Cut(
        global_batch_size=batch_size * topology.world_size,
        accumulate=1,
        rank=topology.rank,
        world_size=topology.world_size,
        workers=source.workers,
    )
    reading = Reading(source, ranks, cut, seed=seed, start=Start(), count=count)
    while (portion := reading.next()) is not None:
        for batch, samples in zip(portion.batches, portion.sizes, strict=True):
            yield to_device(batch, ranks.device, non_blocking=True), samples
