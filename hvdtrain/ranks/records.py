"""What the ranks' store keeps, and what can be asked of it: all of it is answered at once, nothing waits.

Operations are lists that JSON can carry, the first entry their name. Values are bytes, as text of as many characters.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


def text(value: bytes) -> str:
    """Bytes as JSON carries them."""
    return value.decode("latin-1")


def raw(value: str) -> bytes:
    """And back."""
    return value.encode("latin-1")


@dataclass(slots=True)
class Records:
    """Keys and values, and which ranks are gone.

    Attributes:
        kept: The values, as text.
        set_at: When each was last set, by this process's clock: the ranks' own differ from host to host.
        lost: Ranks whose process has ended without a farewell, each with how: "signal 9", "exit code 3", or "" if
            nobody could see.
    """

    kept: dict[str, str] = field(default_factory=dict)
    set_at: dict[str, float] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)

    def do(self, operations: Sequence[Sequence[Any]]) -> list[Any]:
        """Do all operations, one after the other, with no other rank's in between; return what each of them answers."""
        return [getattr(self, f"_{operation[0]}")(*operation[1:]) for operation in operations]

    def _set(self, key: str, value: str) -> None:
        self.kept[key] = value
        self.set_at[key] = time.monotonic()

    def _ages(self, keys: Sequence[str]) -> list[float | None]:
        """Seconds since each key was last set; None for one that never was."""
        now = time.monotonic()
        return [now - self.set_at[key] if key in self.set_at else None for key in keys]

    def _now(self) -> int:
        """This process's clock, in nanoseconds since 1970."""
        return time.time_ns()

    def _get(self, key: str) -> str | None:
        return self.kept.get(key)

    def _check(self, keys: Sequence[str]) -> bool:
        return all(key in self.kept for key in keys)

    def _compare_set(self, key: str, expected: str, desired: str) -> str:
        """Set a key that has the expected value, or has none while "" is expected; return what it has then."""
        if self.kept.get(key, "") == expected:
            self.kept[key] = desired
        return self.kept.get(key, expected)

    def _add(self, key: str, amount: int) -> int:
        total = int(self.kept.get(key, "0")) + amount
        self.kept[key] = str(total)
        return total

    def _append(self, key: str, value: str) -> None:
        self.kept[key] = self.kept.get(key, "") + value

    def _delete(self, key: str) -> bool:
        self.set_at.pop(key, None)
        return self.kept.pop(key, None) is not None

    def _names(self, prefix: str) -> list[str]:
        return [key for key in self.kept if key.startswith(prefix)]

    def _count(self, prefix: str) -> int:
        return sum(key.startswith(prefix) for key in self.kept)

    def _lost(self) -> list[list[Any]]:
        return [[rank, how] for rank, how in self.lost.items()]
