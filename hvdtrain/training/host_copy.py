"""A state's copy in host memory, which can be written down while training changes the original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Memory that a state is copied into, kept for the next time: to be given new pages costs as much as the copy.

    One copy at a time: the next overwrites the one before.
    """

    def __init__(self) -> None:
        self._rooms: list[Tensor] = []
        self._used = 0
        self._copies: dict[tuple[Any, ...], Tensor] = {}
        self._cuda = False

    def of(self, *states: Any) -> tuple[Any, ...]:
        """Copy dictionaries and lists of tensors and plain values; what shared memory shares it again.

        Args:
            states: Of dense tensors on any device.

        Returns:
            The copies, complete.
        """
        self._used, self._copies, self._cuda = 0, {}, False
        copies = tuple(self._copy(state) for state in states)
        del self._rooms[self._used :]
        self._copies = {}
        if self._cuda:
            torch.cuda.synchronize()
        return copies

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value.detach())
        if isinstance(value, Mapping):
            return {key: self._copy(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item) for item in value]
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
            return value.clone()  # of kinds that cannot be written: the writer says so
        key = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and key in self._copies:
            return self._copies[key]
        room = self._room(value)
        room.copy_(value, non_blocking=value.is_cuda)
        self._cuda |= value.is_cuda
        self._copies[key] = room
        return room

    def _room(self, value: Tensor) -> Tensor:
        """Memory of the same form: that of the time before, where it fits."""
        index = self._used
        self._used += 1
        if index < len(self._rooms):
            room = self._rooms[index]
            if room.dtype == value.dtype and room.shape == value.shape and room.stride() == _stride(value):
                return room
        room = torch.empty_like(value, device="cpu", memory_format=torch.preserve_format)
        if value.is_cuda:
            room = room.pin_memory()
        self._rooms[index : index + 1] = [room]
        return room


def _stride(value: Tensor) -> tuple[int, ...]:
    """How a copy of a tensor lies in memory."""
    return torch.empty_like(value, device="meta", memory_format=torch.preserve_format).stride()
