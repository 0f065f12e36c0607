"""What torch asks of a store while it makes process groups, answered by the ranks' store.

torch's own store has no secret, and waits without a bound for a server that is stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hvdtrain.ranks.store import Store

_Store: Any = dist.Store
_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.02


class EngineStore(_Store):  # type: ignore[misc]
    """A `torch.distributed.Store`. Keep it: what torch holds is only the half of it that is C++.

    Args:
        store: Shared by all ranks.
        timeout_s: Bound of each wait, in seconds.
        look: Called while it waits; raises if that is in vain.
    """

    def __init__(self, store: Store, timeout_s: float, look: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._kept = store
        self._bound = timedelta(seconds=timeout_s)
        self._look = look

    def set(self, key: str, value: str | bytes) -> None:
        """Set a key."""
        self._kept.set(key, value)

    def get(self, key: str) -> bytes:
        """Return a key's value, once it has one."""
        self.wait([key])
        return self._kept.get(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return when all keys have values.

        Raises:
            RuntimeError: They have none within the timeout.
        """
        bound = (timeout or self._bound).total_seconds()
        end, pause = time.monotonic() + bound, _FIRST_PAUSE_S
        while not self._kept.check(keys):
            self._look()
            if time.monotonic() > end:
                raise RuntimeError(f"timed out: the other ranks did not come within {bound:g} s")
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE_S, pause * 1.5)

    def check(self, keys: list[str]) -> bool:
        """Whether all keys have values."""
        return self._kept.check(keys)

    def add(self, key: str, amount: int) -> int:
        """Add to a number and return the sum."""
        return self._kept.add(key, amount)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set a key if it has the expected value; return what it has then."""
        return self._kept.compare_set(key, expected, desired)

    def append(self, key: str, value: str | bytes) -> None:
        """Append to a key's value."""
        self._kept.append(key, value)

    def delete_key(self, key: str) -> bool:
        """Forget a key."""
        return self._kept.delete_key(key)

    def num_keys(self) -> int:
        """How many keys have values."""
        return self._kept.count()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Several keys' values, once they have some."""
        return [self.get(key) for key in keys]

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:
        """Set several keys."""
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def has_extended_api(self) -> bool:
        """There are append, multi_get and multi_set."""
        return True

    def clone(self) -> EngineStore:
        """Several threads may share it."""
        return self

    @property
    def timeout(self) -> timedelta:
        """Bound of each wait."""
        return self._bound

    def set_timeout(self, timeout: timedelta) -> None:
        """Set the bound of each wait."""
        self._bound = timeout
