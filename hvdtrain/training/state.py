"""What a run must remember to go on exactly: objects with a state, and this rank's random numbers.

States are captured by value and hold only what `torch.load(weights_only=True)` reads: tensors, numbers, text, lists and
dictionaries of these.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch


@runtime_checkable
class Stateful(Protocol):
    """Anything whose state can be saved and restored."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        ...


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed torch (CPU and GPUs), NumPy and `random` from the run's seed and the rank.

    Different ranks get unrelated numbers, so that dropout masks differ; the same rank gets the same ones again.
    """
    mixed = hashlib.sha256(f"{seed}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(mixed[:8], "little") >> 1)
    random.seed(mixed)
    np.random.seed(int.from_bytes(mixed[8:12], "little"))


def random_state() -> dict[str, Any]:
    """Return the state of every random generator of this process."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
    }
    name, keys, position, has_gauss, cached = cast("tuple[str, Any, int, int, float]", np.random.get_state(legacy=True))
    state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(cached)]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Continue from `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Put every random generator back afterwards to where it was."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
