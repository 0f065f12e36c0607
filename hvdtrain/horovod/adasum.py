"""Adasum (Maleki and others 2020): a sum that adds what is orthogonal and averages what is parallel.

In each of log2(size) rounds a rank exchanges its tensor with a neighbour twice as far away, and both combine
``(1 - a.b / 2 a.a) a + (1 - a.b / 2 b.b) b``. Sizes are powers of two, as in Horovod.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvdtrain.backends.communicator import Communicator

_TINY = 2.0**-511  # below it the square of a norm says nothing: sqrt of the smallest normal float64


def combined(left: Tensor, right: Tensor) -> Tensor:
    """What two ranks' tensors come to."""
    a, b = left.double().reshape(-1), right.double().reshape(-1)
    dot, of_a, of_b = (float(value) for value in (a @ b, a @ a, b @ b))
    share_a = 1.0 - dot / of_a * 0.5 if of_a >= _TINY else 1.0
    share_b = 1.0 - dot / of_b * 0.5 if of_b >= _TINY else 1.0
    return (share_a * a + share_b * b).reshape(left.shape).to(left.dtype)


def adasum(communicator: Communicator, tensor: Tensor) -> Tensor:
    """Combine all ranks' tensors; every rank gets the same.

    Args:
        communicator: Of a power of two ranks.
        tensor: Floating point, the same shape on every rank.
    """
    rank, distance, mine = communicator.wire.rank, 1, tensor.detach().to(torch.float64, copy=True)
    while distance < communicator.wire.size:
        other = rank ^ distance
        theirs = communicator.sendrecv(mine, other, other)
        mine = combined(mine, theirs) if rank < other else combined(theirs, mine)
        distance *= 2
    return mine.to(tensor.dtype)
