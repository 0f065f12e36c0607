"""How much memory this process has, read without waiting for a device."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_STATM = Path("/proc/self/statm")


def memory_in_use(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that torch holds for this process, or, for a CPU, its resident set; None if it cannot be read."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):  # another system
        return None
