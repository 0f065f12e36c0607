"""Tensors that are kept until the engine's own threads have let go of them, for older versions of torch.

Gloo's threads drop the tensors of an operation a moment after it is over. Where Python has dropped them before, they need the
interpreter's lock for it, and older process groups wait for their threads with that lock held when they are destroyed: both
wait for ever (https://github.com/pytorch/pytorch/pull/154976; seen with torch 2.4.1).
"""

from __future__ import annotations

import time
from collections import deque

import torch
from torch import Tensor

_NEEDED = tuple(int(part) for part in str(torch.__version__).split(".")[:2]) < (2, 9)
_LONGEST_S = 1.0  # a tensor that is held for longer than an operation takes to be forgotten is held by somebody else
_PAUSE_S = 0.001

_kept: deque[tuple[float, Tensor]] = deque()


def keep(*tensors: Tensor) -> None:
    """Keep what an operation that has just been started works on."""
    if not _NEEDED:
        return
    while _kept and _forgotten(*_kept[0]):
        _kept.popleft()
    now = time.monotonic()
    _kept.extend((now, tensor) for tensor in tensors)


def let_go() -> None:
    """Wait until no thread holds what was kept, a second at most; before a group, whose operations are over, is destroyed."""
    while _kept:
        if _forgotten(*_kept[0]):
            _kept.popleft()
        else:
            time.sleep(_PAUSE_S)


def _forgotten(since: float, tensor: Tensor) -> bool:
    return tensor._use_count() <= 1 or time.monotonic() - since > _LONGEST_S
