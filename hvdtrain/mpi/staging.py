"""Contiguous CPU versions of whatever tensors the user has, and the way back.

A GPU tensor goes through pinned host memory, in order with the stream that made it; an MPI library that takes GPU
pointers is given them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvdtrain.mpi.library import cuda_aware


@dataclass(slots=True)
class Staged:
    """A tensor and what MPI works on in its place.

    Attributes:
        tensor: The user's.
        host: Contiguous, and in memory that MPI can reach; the same memory where possible.
        event: On the GPU: when ``tensor`` holds its values.
        filled: Whether ``host`` holds the values.
    """

    tensor: Tensor
    host: Tensor
    event: torch.cuda.Event | None = None
    filled: bool = True


class Staging:
    """Makes and returns `Staged` tensors; asks once whether the MPI library takes GPU pointers."""

    def __init__(self) -> None:
        self._aware: bool | None = None

    def take(self, tensor: Tensor) -> Staged:
        """Note a tensor that will be read, in the caller's thread and stream; `ready` completes it."""
        if not tensor.is_cuda:
            return Staged(tensor, _dense(tensor))
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensor.device))
        if self._direct(tensor):
            return Staged(tensor, tensor, event)
        return Staged(tensor, self._pinned(tensor), event, filled=False)

    def room(self, tensor: Tensor) -> Staged:
        """Make room for a tensor that will be written only."""
        if tensor.is_cuda:
            return Staged(tensor, tensor if self._direct(tensor) else self._pinned(tensor))
        plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        return Staged(tensor, tensor if plain else torch.empty(tensor.shape, dtype=tensor.dtype))

    def ready(self, staged: Staged) -> None:
        """Make sure that ``host`` holds the values."""
        if staged.event is not None:
            staged.event.synchronize()
        if not staged.filled:
            staged.host.copy_(staged.tensor)
            staged.filled = True

    def give_back(self, staged: Staged) -> None:
        """Copy ``host`` to the user's tensor, if it is another."""
        if staged.host is staged.tensor:
            return
        staged.tensor.data.copy_(staged.host)  # as MPI would write it: a change that autograd does not count
        if staged.tensor.is_cuda:
            torch.cuda.current_stream(staged.tensor.device).synchronize()

    def _direct(self, tensor: Tensor) -> bool:
        if self._aware is None:
            self._aware = cuda_aware()
        return self._aware and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()

    @staticmethod
    def _pinned(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def _dense(tensor: Tensor) -> Tensor:
    plain = tensor.resolve_conj().resolve_neg()
    return plain if plain.is_contiguous() else plain.contiguous()
