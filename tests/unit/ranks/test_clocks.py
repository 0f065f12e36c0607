"""The ranks' common clock, and how sure of it one can be."""

from __future__ import annotations

import time

from hvdtrain.ranks.clocks import clock_offset
from hvdtrain.ranks.store import Store


class Elsewhere(Store):
    """A store whose host's clock is ahead, behind a way of some time there and some back."""

    def __init__(self, ahead_ns: int, there_s: list[float], back_s: float) -> None:
        super().__init__()
        self._ahead_ns, self._there_s, self._back_s = ahead_ns, there_s, back_s

    def ask(self, *operations, within_s=None):
        time.sleep(self._there_s.pop() if len(self._there_s) > 1 else self._there_s[0])
        (now,) = super().ask(*operations)
        time.sleep(self._back_s)
        return [now + self._ahead_ns]


def test_an_offset_is_found_within_the_error_that_is_named():
    for ahead_ns in (-(10**10), 0, 3 * 10**9):
        found = clock_offset(Elsewhere(ahead_ns, [0.002], 0.0))  # all of the way is on one side: the worst case
        assert abs(found.offset_ns - ahead_ns) <= found.error_ns
        assert 1e6 <= found.error_ns < 5e8


def test_the_fastest_answer_is_believed():
    slow = [0.001, *[0.05] * 3]  # the last ones are asked first
    found = clock_offset(Elsewhere(5, slow, 0.0))
    assert found.error_ns < 2e7


def test_one_process_is_its_own_clock():
    found = clock_offset(Store())
    assert abs(found.offset_ns) <= found.error_ns < 1e7
