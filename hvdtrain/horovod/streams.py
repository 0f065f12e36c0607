"""Work on GPUs in the order of the program, whichever thread performs an operation.

The thread that performs one has streams of its own: what computes its tensors must be done before, and what uses its results
must come after.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def reached(tensors: Iterable[Tensor]) -> list[torch.cuda.Event]:
    """Where the calling thread's streams are now, on the GPUs of these tensors; empty for tensors on the CPU."""
    events = []
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        with torch.cuda.device(device):
            event = torch.cuda.Event()
            event.record()
        events.append(event)
    return events


def come_after(events: Iterable[torch.cuda.Event]) -> None:
    """Let what the calling thread does next on those GPUs come after what `reached` was told of."""
    for event in events:
        torch.cuda.current_stream(event.device).wait_event(event)
