"""How far this host's clock is from one that all ranks can read: the one of the process that keeps their store."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hvdtrain.ranks.store import Store

_TRIES = 16


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """To be added to ``time.time_ns()`` of this process.

    Attributes:
        offset_ns: So much the common clock is ahead.
        error_ns: At most so far off the offset is, as long as the clocks run alike: half of the shortest way there and back.
    """

    offset_ns: int
    error_ns: int


def clock_offset(store: Store) -> ClockOffset:
    """Ask for the time several times, and believe the answer that came fastest (Cristian 1989, doi:10.1007/BF01784024)."""
    best: ClockOffset | None = None
    for _ in range(_TRIES):
        asked = time.time_ns()
        (there,) = store.ask(["now"])
        back = time.time_ns()
        found = ClockOffset(int(there) - (asked + back) // 2, max(0, back - asked) // 2 + 1)
        if best is None or found.error_ns < best.error_ns:
            best = found
    assert best is not None
    return best
