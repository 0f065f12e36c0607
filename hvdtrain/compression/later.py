"""A compression that begins after some exchanges; the first ones travel as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from hvdtrain.compression.base import Compression, Exchange, Memory, Sent, Sum

_COUNT = "exchanges as they are"


class Later(Compression):
    """Another compression, once a parameter has been exchanged so many times as it is.

    Gradients change fastest in the beginning, and what is sent late then costs most.

    Args:
        compression: The other one.
        after: How many exchanges, 1 or more.
    """

    def __init__(self, compression: Compression, after: int) -> None:
        self.inner, self.after = compression, after
        self.name = f"{compression.name},after={after}"
        self.rounds = compression.rounds

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the other one does."""
        return self.inner.takes(shape)

    def exchange(self, tensor: Tensor, memory: Memory, seed: int) -> Exchange:
        """Sum the tensor, or let the other compression exchange it."""
        count = int(memory.get(_COUNT, 0))
        if count < self.after:
            total = yield Sum(tensor)
            return Sent(total, None, {_COUNT: torch.tensor(count + 1)})
        sent = yield from self.inner.exchange(tensor, {k: v for k, v in memory.items() if k != _COUNT}, seed)
        return Sent(sent.total, sent.own, {**sent.memory, _COUNT: torch.tensor(count)})
