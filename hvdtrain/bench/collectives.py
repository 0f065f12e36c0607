"""What rounds of timed collectives come to: times and bandwidths by collective, size and contender. Pure, but for reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdtrain.bench.bandwidth import FACTORS, bus_bandwidth, size_named, whole_size
from hvdtrain.bench.gathered import read_ranks, slowest
from hvdtrain.bench.spread import Spread, digits
from hvdtrain.errors import ConfigError

COPY, RAW = "copy", "raw MPI"
Times = dict[str, dict[int, list[float]]]
"""Seconds of each call, by collective and size."""


@dataclass(kw_only=True, slots=True)
class Measured:
    """All times of all rounds.

    Attributes:
        ranks: How many took part.
        times: By contender; those of the slowest rank.
    """

    ranks: int
    times: dict[str, Times] = field(default_factory=dict)

    def add(self, contender: str, times: Times) -> None:
        """One launch's."""
        own = self.times.setdefault(contender, {})
        for collective, by_size in times.items():
            for size, of in by_size.items():
                own.setdefault(collective, {}).setdefault(size, []).extend(of)

    def seconds(self, contender: str, collective: str, size: int) -> Spread | None:
        """Of one call; None where it was not measured."""
        of = self.times.get(contender, {}).get(COPY if contender == COPY else collective, {}).get(size)
        return Spread.of(of) if of else None

    def bandwidth(self, contender: str, collective: str, size: int, seconds: float) -> float:
        """Bus bandwidth in bytes a second; of a copy the bytes copied."""
        if contender == COPY:
            return size / seconds
        return bus_bandwidth(collective, whole_size(collective, size, self.ranks), seconds, self.ranks)


def read_times(folder: Path, ranks: int) -> Times:
    """What the ranks of one launch wrote: of each call the slowest rank's time.

    Raises:
        ConfigError: Not every rank wrote what it should.
    """
    of_ranks = read_ranks(folder, ranks)
    return {
        collective: {int(size): slowest(one[collective][size] for one in of_ranks) for size in by_size}
        for collective, by_size in of_ranks[0].items()
    }


def rows(measured: Measured, collective: str, sizes: Sequence[int]) -> list[list[str]]:
    """A table: the header, then a line a size with each contender's time and bus bandwidth."""
    contenders = list(measured.times)
    header = ["size"]
    for contender in contenders:
        header += [f"{contender} us", "GB/s"]
    found = [header]
    for size in sizes:
        line = [size_named(size)]
        for contender in contenders:
            seconds = measured.seconds(contender, collective, size)
            if seconds is None:
                line += ["", ""]
                continue
            micros = seconds.scaled(1e6)
            rate = measured.bandwidth(contender, collective, size, seconds.median) / 1e9
            line += [f"{digits(micros.median)} ({digits(micros.low)}-{digits(micros.high)})", f"{rate:.2g}"]
        if whole_size(collective, size, measured.ranks):
            found.append(line)
    return found


def as_json(measured: Measured, **environment: Any) -> dict[str, Any]:
    """All of it, for programs: quartiles of seconds, and bus bandwidth at the median."""
    results: dict[str, Any] = {}
    for contender, times in measured.times.items():
        for collective, by_size in times.items():
            for size in by_size:
                seconds = measured.seconds(contender, collective, size)
                assert seconds is not None
                rate = measured.bandwidth(contender, collective, size, seconds.median)
                results.setdefault(collective, {}).setdefault(str(size), {})[contender] = {
                    "seconds": seconds.as_json(),
                    "bus_bytes_per_second": rate,
                    "calls": len(by_size[size]),
                }
    return {"benchmark": "collectives", "world_size": measured.ranks, **environment, "results": results}


def collectives_of(text: str) -> list[str]:
    """The collectives that ``--collectives`` names.

    Raises:
        ConfigError: There is no such one.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in FACTORS]
    if wrong or not names:
        raise ConfigError(f"--collectives {text}: use some of {', '.join(FACTORS)}, with commas between")
    return list(dict.fromkeys(names))


def bandwidths(measured: Measured, collective: str) -> Mapping[str, list[tuple[int, Spread]]]:
    """For a picture: each contender's sizes with the quartiles of its bus bandwidth in bytes a second."""
    found: dict[str, list[tuple[int, Spread]]] = {}
    for contender, times in measured.times.items():
        for size in sorted(times.get(COPY if contender == COPY else collective, {})):
            seconds = measured.seconds(contender, collective, size)
            assert seconds is not None
            low, median, high = (
                measured.bandwidth(contender, collective, size, value)
                for value in (seconds.high, seconds.median, seconds.low)
            )
            found.setdefault(contender, []).append((size, Spread(low=low, median=median, high=high)))
    return found
