"""Sizes of messages, and what a time means as a bandwidth, as nccl-tests have it. Pure.

With a size of S bytes and a time of t seconds the algorithm bandwidth is S/t. The bus bandwidth is that times a factor, so that
it compares with what a link can do, whatever the number of ranks (https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md). S is
the whole array: what is reduced or broadcast; what a rank has gathered in the end, or had to be scattered; what it sends to all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hvdtrain.errors import ConfigError
from hvdtrain.settings.wording import shown

ITEM_BYTES = 4
"""Of a float32, of which all messages consist."""

FACTORS: Mapping[str, Callable[[int], float]] = {
    "all-reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all-gather": lambda ranks: (ranks - 1) / ranks,
    "reduce-scatter": lambda ranks: (ranks - 1) / ranks,
    "broadcast": lambda ranks: 1.0,
    "all-to-all": lambda ranks: (ranks - 1) / ranks,
}
"""Bus bandwidth over algorithm bandwidth, by the number of ranks."""
CUT = ("all-gather", "reduce-scatter", "all-to-all")
"""Collectives whose array is cut into one part a rank."""
_UNITS = {"": 1, "b": 1, "k": 2**10, "kb": 2**10, "kib": 2**10, "m": 2**20, "mb": 2**20, "mib": 2**20, "g": 2**30, "gb": 2**30, "gib": 2**30}  # fmt: skip


def sizes(largest: int) -> list[int]:
    """Powers of two of bytes, from 4 to ``largest``."""
    return [2**power for power in range(2, largest.bit_length()) if 2**power <= largest]


def whole_size(collective: str, size: int, ranks: int) -> int:
    """The size nearest below that can be cut for the ranks, in bytes; 0 if none can."""
    part = ITEM_BYTES * (ranks if collective in CUT else 1)
    return size // part * part


def bus_bandwidth(collective: str, size: int, seconds: float, ranks: int) -> float:
    """Bytes a second that a link carries at least.

    Args:
        collective: A name of `FACTORS`.
        size: Bytes of the whole array.
        seconds: Of one call, on the slowest rank.
        ranks: How many took part.
    """
    return size / seconds * FACTORS[collective](ranks)


def size_named(size: float) -> str:
    """As people say it: 4 B, 16 KiB, 128 MiB."""
    unit = 0
    while size >= 1024 and unit < 3:
        size, unit = size / 1024, unit + 1
    return f"{size:.4g} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def size_of(flag: str, text: str) -> int:
    """A number of bytes such as ``65536``, ``64K`` or ``16M``, in powers of 1024.

    Raises:
        ConfigError: It is none, or not from 4 bytes to 16 GiB.
    """
    digits = text.strip().rstrip("bBkKmMgGiI ")
    unit = _UNITS.get(text.strip()[len(digits) :].strip().lower())
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 12 or unit is None:
        raise ConfigError(f"{flag} must be bytes, such as 65536, 64K or 16M, got {shown(text)}")
    size = int(digits) * unit
    if not ITEM_BYTES <= size <= 2**34:
        raise ConfigError(f"{flag} must be from 4 bytes to 16G, got {shown(text)}")
    return size
