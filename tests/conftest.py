"""What holds for all tests."""

from __future__ import annotations

import gc


def pytest_unconfigure() -> None:
    """The command line freezes what it has loaded before it trains; frozen, Triton's objects are taken for leaked at the end."""
    gc.unfreeze()
