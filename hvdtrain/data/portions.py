"""One rank's part of a stream, read in portions: what the rank has of one global batch.

`PortionReader` runs where samples are read: in the rank, or in each of its loader processes. It yields an `Opening`, then
`Portion` after `Portion`, and an `End`. Two kinds of reading:

A stream that splits itself: the reader has a part of its own, and a portion is as many samples of it as this rank takes for
a global batch.

A stream that does not: every reader, on every rank, goes through all of it in blocks of a global batch. The block's samples
go to the ranks in turn, and the blocks to a rank's loader processes in turn. So the global batches are the same for every
number of ranks and loader processes.

Random numbers of torch, NumPy and `random` that a stream draws are seeded for each portion by the position in the stream:
it yields the same samples in the same order everywhere, and after a resume.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, default_collate

from hvdtrain.data.loader import TwoBatches
from hvdtrain.data.partition import share
from hvdtrain.data.random_numbers import seed_process, untouched_random_numbers
from hvdtrain.data.sample_count import SampleCount
from hvdtrain.data.streams import STRIDE, begin, keeps_state, part_of, set_epoch, way_of


class Portion(NamedTuple):
    """What one rank has of a global batch.

    Attributes:
        batches: Its micro-batches, collated.
        sizes: Samples of each.
        total: Samples of the global batch, over all ranks, where every rank reads all of them; else None.
        worker: Which reader it is of.
        state: The stream's own after these samples, as far as it has one and it was asked for.
    """

    batches: tuple[Any, ...]
    sizes: tuple[int, ...]
    total: int | None
    worker: int
    state: Any

    @property
    def samples(self) -> int:
        """Of this rank."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Opening:
    """What a reader tells before anything else.

    Attributes:
        first: What `look` says of the stream's first sample; None if there is none.
        pair: One sample collated into two batches that differ in length, from which an empty one can be made; None if there
            is none, or it was not asked for.
    """

    first: Any
    pair: tuple[Any, Any] | None


@dataclass(frozen=True, slots=True)
class End:
    """The reader has no more."""

    worker: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How a stream is cut for one rank.

    Attributes:
        global_batch_size: Samples of a step over all ranks.
        accumulate: Micro-batches that a rank's share is cut into.
        rank, world_size: Whose share.
        workers: Loader processes of a rank; 0 for reading in the rank itself.
    """

    global_batch_size: int
    accumulate: int
    rank: int
    world_size: int
    workers: int

    @property
    def readers(self) -> int:
        """How many of this rank read the stream."""
        return max(1, self.workers)

    @property
    def own(self) -> int:
        """Samples of this rank in a full step."""
        return len(share(self.global_batch_size, self.world_size, self.rank))

    def passes(self, total: int) -> int:
        """Micro-batches of the rank that has most, where the ranks share ``total`` samples evenly."""
        return min(self.accumulate, -(-total // self.world_size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where an epoch is begun, or taken up.

    Attributes:
        epoch: Epochs completed.
        skip: Samples to read and leave, by reader: of its part, or of the stream.
        states: The stream's own states to go on from, by reader.
        ended: Readers that had no more.
        first: The reader whose turn it is.
        at: Samples of the stream that are done, for one that is read whole.
    """

    epoch: int = 0
    skip: tuple[int, ...] = ()
    states: tuple[Any, ...] = ()
    ended: tuple[int, ...] = ()
    first: int = 0
    at: int = 0


class PortionReader(IterableDataset[Any]):
    """Reads; see above.

    Args:
        stream: The whole.
        cut: Whose share.
        collate: Makes a micro-batch out of a list of samples.
        seed: Of random numbers.
        look: Gets a list with the stream's first sample, and remembers what of it is compared over the ranks.

    Attributes:
        start: Where the next iteration begins.
        show_pair: The opening brings two batches, for an empty one.
        count: A batch must have as many samples as it was made of, as far as that shows.
        keep_states: Portions bring the stream's state.
    """

    def __init__(
        self,
        stream: Any,
        cut: Cut,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
        look: Callable[[Any], Any] = type,
    ) -> None:
        self.start = Start()
        self.show_pair = self.count = False
        self._seen: SampleCount | None = None
        self.keep_states = False
        self._stream = stream
        self._cut = cut
        self._collate = collate or default_collate
        self._seed = seed
        self._look = look
        self._whole = way_of(stream) == STRIDE

    def __iter__(self) -> Iterator[Any]:
        cut, start = self._cut, self.start
        info = torch.utils.data.get_worker_info()
        apart = nullcontext if info is not None else untouched_random_numbers
        worker = ((0 if info is None else info.id) + start.first) % cut.readers
        if worker in start.ended:
            yield Opening(None, None)
            yield End(worker)
            return
        part = part_of(self._stream, rank=cut.rank, world_size=cut.world_size, worker=worker, workers=cut.readers)
        set_epoch(part, start.epoch)  # the stream may have been told; a part of it need not know
        if start.states and start.states[worker] is not None:
            part.load_state_dict(start.states[worker])
        # A stream may choose an order when its first sample is asked for: alike everywhere.
        with apart():
            seed_process(self._seed, 4, start.epoch)
            samples = iter(begin(part))
            first = list(itertools.islice(samples, 1))
            opening = self._open(first)
        yield opening
        samples = itertools.chain(first, samples)
        del first, opening
        read = self._blocks if self._whole else self._runs
        yield from read(samples, part, worker, apart)
        yield End(worker)

    def _open(self, first: list[Any]) -> Opening:
        if not first:
            return Opening(None, None)
        look = self._look(first)
        if self.count and self._collate is not default_collate:
            with suppress(Exception):  # a collate function need not take the same sample twice
                self._seen = SampleCount(*(TwoBatches(self._collate)(first) or ()))
        return Opening(look, TwoBatches(self._collate)(first) if self.show_pair else None)

    def _blocks(
        self, samples: Iterator[Any], stream: Any, worker: int, apart: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[Portion]:
        """Of a stream that every reader reads whole: this rank's samples of the blocks that are this reader's."""
        cut, start = self._cut, self.start
        left = start.skip[worker] if start.skip else 0
        at, turn = start.at - left, start.first
        while True:
            mine = left <= 0 and turn % cut.readers == worker
            with apart():
                seed_process(self._seed, 5, start.epoch, at)
                kept, length = [], 0
                for sample in itertools.islice(samples, cut.global_batch_size):
                    if mine and length % cut.world_size == cut.rank:
                        kept.append(sample)
                    length += 1
                portion = self._portion(kept, length, stream, worker, at) if mine and length else None
            if portion is not None:
                yield portion
            if length < cut.global_batch_size:
                return
            at += length
            turn += left <= 0
            left -= length

    def _runs(
        self, samples: Iterator[Any], part: Any, worker: int, apart: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[Portion]:
        """Of a part that is this reader's alone: as many samples at a time as a step takes."""
        cut, start = self._cut, self.start
        left = start.skip[worker] if start.skip else 0
        at = 0
        while True:
            with apart():
                seed_process(self._seed, 6, start.epoch, at, cut.rank, worker)
                kept = list(itertools.islice(samples, cut.own))
                portion = self._portion(kept, None, part, worker, at) if kept and left <= 0 else None
            if portion is not None:
                yield portion
            if len(kept) < cut.own:
                return
            at += len(kept)
            left -= len(kept)

    def _portion(self, kept: list[Any], total: int | None, stream: Any, worker: int, at: int) -> Portion:
        cut = self._cut
        pieces = [share(len(kept), cut.accumulate, piece) for piece in range(min(cut.accumulate, len(kept)))]
        state = stream.state_dict() if self.keep_states and keeps_state(stream) else None
        seed_process(self._seed, 7, self.start.epoch, at, cut.rank, worker)
        batches = tuple(self._collate(kept[piece.start : piece.stop]) for piece in pieces)
        if self._seen is not None:
            for batch, piece in zip(batches, pieces, strict=True):
                self._seen.check(batch, len(piece))
        return Portion(
            batches=batches,
            sizes=tuple(map(len, pieces)),
            total=total,
            worker=worker,
            state=state,
        )
