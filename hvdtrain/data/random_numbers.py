"""The random numbers of this process, borrowed and given back.

What looks at data before training (how large is a sample, is it the same everywhere, what does an empty batch look
like) must not change which numbers training draws.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_process(*numbers: int) -> None:
    """Seed the usual sources of random numbers on the CPU (torch, NumPy, `random`) from a few integers.

    torch's CPU generator takes 32 bits of a seed, so they are mixed first: neighbouring numbers share nothing.
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=20).digest()
    words = [int.from_bytes(digest[start : start + 4], "little") for start in range(0, 20, 4)]
    torch.default_generator.manual_seed(words[0])  # torch.manual_seed would also speak to CUDA, which a fork must not
    random.seed(digest)
    np.random.seed(words[1:])


@contextmanager
def untouched_random_numbers() -> Iterator[None]:
    """Put torch's, NumPy's and `random`'s generators back afterwards to where they were."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
