"""What malloc does with memory that is freed.

A training step allocates and frees the same gradients and activations each time. glibc gives freed blocks of more than a
few megabytes back to the system, so that every step gets its pages anew, and zeroed: a quarter of the step of a model of
large layers on a CPU (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT_BYTES = 2**31 - 1  # free memory at the top of the heap; an int is what mallopt takes
_LARGEST_BYTES = 2**28  # larger blocks go back to the system as before


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for the next step; the most that was ever in use at once stays the same.

    Left alone is who has chosen: MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ or glibc.malloc in GLIBC_TUNABLES are
    set, or LD_PRELOAD brings another malloc.

    Returns:
        Whether it was done.
    """
    if not sys.platform.startswith("linux") or chosen_by_user():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES) and mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))


def chosen_by_user() -> bool:
    """Whether the environment says how memory is to be handled."""
    named = any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"))
    preloaded = "malloc" in os.environ.get("LD_PRELOAD", "")
    return named or preloaded or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
