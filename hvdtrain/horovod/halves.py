"""Sums of float16 and bfloat16 that travel as they are, are made in float32 and are rounded once.

An engine's own sum would round after each addition, and overflow where the sum of an average does. Each rank adds up one part of
the tensor instead, which takes two exchanges: the ranks' parts to the one that adds them, and the sums to all. What is sent is
what a ring sends, of half as many bytes as in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvdtrain.backends.layout import bytes_of
from hvdtrain.backends.wire import Wire

HALVES = (torch.float16, torch.bfloat16)
FROM_BYTES = 2**14
"""Of a tensor: below it, one exchange in float32 is quicker than two of half the bytes."""


class HalfSum:
    """One such sum, whose first exchange is started; `spread` must follow, and then `finish`, in one order on every rank.

    Args:
        wire: Of the ranks.
        tensor: Contiguous, of a dtype in `HALVES`, on the wire's device; written by `finish`.
    """

    def __init__(self, wire: Wire, tensor: Tensor) -> None:
        self._wire, self._tensor = wire, tensor
        self._rows = -(-tensor.numel() // wire.size)
        self._sent = torch.zeros(self._rows * wire.size, dtype=tensor.dtype, device=tensor.device)
        self._sent[: tensor.numel()] = tensor.reshape(-1)
        self._heard = torch.empty_like(self._sent)
        sizes = [self._rows * tensor.element_size()] * wire.size
        self._work = wire.all_to_all_into(bytes_of(self._heard), bytes_of(self._sent), sizes, sizes)

    def spread(self, scale_: Callable[[Tensor], None]) -> None:
        """Add up this rank's part, and start to send it to the others.

        Args:
            scale_: Is given the sum, in float32, before it is rounded; works in place.
        """
        self._work.wait()
        parts = self._heard.view(self._wire.size, self._rows)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        scale_(total)
        self._mine = total.to(self._tensor.dtype)
        mine, whole = bytes_of(self._mine), bytes_of(self._sent)
        self._work = self._wire.all_gather_into(whole.view(self._wire.size, mine.numel()), mine)

    def finish(self) -> None:
        """Return when the tensor is what all ranks' tensors come to."""
        self._work.wait()
        self._tensor.copy_(self._sent[: self._tensor.numel()].view(self._tensor.shape))
