"""One pass over a stream on one rank, and whether all ranks read the same."""

from __future__ import annotations

from typing import Any

from hvdtrain.data.loader import stream_loader
from hvdtrain.data.portions import Cut, End, Opening, Portion, PortionReader, Start
from hvdtrain.data.reach import Ranks
from hvdtrain.data.same_data import describe, difference
from hvdtrain.data.source import Source
from hvdtrain.data.streams import STRIDE, name_of, set_epoch, way_of
from hvdtrain.errors import ConfigError


class Reading:
    """One pass over a stream, on this rank: its portions, one after the other.

    Args:
        source: What is read, and how.
        ranks: All of them; every rank must begin the pass.
        cut: Whose share.
        seed: Of random numbers.
        start: Where.
        keep_states: Portions bring the stream's state.
        show_pair: The openings bring what an empty batch is made from.
        count: A batch must have as many samples as it was made of, as far as that shows.

    Attributes:
        openings: Of this rank's readers.

    Raises:
        ConfigError: The ranks do not read the same.
    """

    def __init__(
        self,
        source: Source,
        ranks: Ranks,
        cut: Cut,
        *,
        seed: int,
        start: Start,
        keep_states: bool = False,
        show_pair: bool = False,
        count: bool = False,
    ) -> None:
        reader = PortionReader(source.dataset, cut, collate=source.collate, seed=seed, look=describe)
        reader.start, reader.keep_states, reader.show_pair = start, keep_states, show_pair
        reader.count = count
        set_epoch(source.dataset, start.epoch)
        self._loaded = iter(
            stream_loader(
                reader,
                workers=source.workers,
                pin_memory=ranks.device.type == "cuda" if source.pin_memory is None else source.pin_memory,
                timeout_s=ranks.timeout_s if source.timeout_s is None else source.timeout_s,
                worker_init=source.worker_init,
                prefetch_factor=source.prefetch_factor,
                multiprocessing_context=source.multiprocessing_context,
            )
        )
        self._ended = set(start.ended)
        self.openings: list[Opening] = [next(self._loaded) for _ in range(cut.readers)]
        if way_of(source.dataset) == STRIDE:
            self._compare(source, ranks, start)

    def next(self) -> Portion | None:
        """Return the next portion; None at the end."""
        for item in self._loaded:
            if not isinstance(item, End):
                assert isinstance(item, Portion)
                return item
            self._ended.add(item.worker)
        return None

    @property
    def ended(self) -> tuple[int, ...]:
        """The readers that have no more, after the portions that were returned."""
        return tuple(sorted(self._ended))

    def _compare(self, source: Source, ranks: Ranks, start: Start) -> None:
        """Every rank reads the whole stream, and keeps its samples: so it must be the same stream everywhere."""
        first = next((opening.first for opening in self.openings if opening.first is not None), None)
        everyone = ranks.all_gather_object(first)
        for rank, theirs in enumerate(everyone):
            if (theirs is None) != (everyone[0] is None):
                what = f"is missing on rank {rank if theirs is None else 0}"
            elif theirs is None or not (found := difference([everyone[0]], [theirs])):
                continue
            else:
                what = f"is another on rank {rank} than on rank 0 ({found[1]})"
            raise ConfigError(other_streams(source.dataset, f"the first sample in epoch {start.epoch + 1} {what}"))


def other_streams(stream: Any, what: str) -> str:
    """Say what differs where ranks read different streams, and the ways out."""
    return (
        f"{name_of(stream)} is not the same stream on every rank: {what}. Either give every rank the same samples in the same "
        "order (seeded alike, without a look at the rank), and each keeps its own; or let its method shard(num_shards, index) "
        "return the stream of part `index`"
    )
