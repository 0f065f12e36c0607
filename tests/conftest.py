"""What holds for all tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Let no garbage collection walk through torch and the tests' modules again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Frozen, Triton's objects are taken for leaked at the end. The command line freezes what it has loaded, too."""
    gc.unfreeze()
