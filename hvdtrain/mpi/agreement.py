"""Is every rank in the same operation on tensors of the same form? Asked before each operation moves a byte.

The question is a small exchange that is started and then looked at, so that whoever waits for the others may stop waiting here
and leave the rest to another thread. Where there are few ranks, the numbers of a small all-reduce ride in it.
"""

from __future__ import annotations

import functools
import hashlib
import time
from typing import Any, Protocol

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hvdtrain.mpi.dtypes import Kind
from hvdtrain.mpi.operations import Mismatch

FEW = 8
"""Ranks up to which everybody's message reaches everybody: the exchange then has room for numbers."""
RIDE_BYTES = 640
"""The most that rides."""
_HEAD_BYTES = 8
_MASK = 2**62 - 1
_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: consecutive numbers give digests far apart

# What NumPy computes as torch and MPI do, whatever the numbers: minimum and maximum differ where there are NaNs.
_FLOATS = {torch.float32: np.float32, torch.float64: np.float64}
_INTEGERS = {torch.int32: np.int32, torch.int64: np.int64, torch.uint8: np.uint8, torch.int8: np.int8}
_COMBINE: dict[Any, Any] = {Kind.SUM: np.add, Kind.AVG: np.add}
_COMBINE_INTEGERS: dict[Any, Any] = {Kind.SUM: np.add, Kind.MIN: np.minimum, Kind.MAX: np.maximum}


class Ride(Protocol):
    """A small operation that is part of the question."""

    def board(self, tensor: Tensor) -> None:
        """Put a contiguous tensor's numbers into this rank's next message."""

    def arrive(self, out: Tensor) -> None:
        """Write what all ranks' messages come to into a contiguous tensor."""


class SumRide:
    """A small all-reduce whose numbers are part of the question; combined on every rank in the order of the ranks.

    Args:
        agreement: Carries them.
        kind: The reduction.
        dtype: Of the tensors.
        count: Their number of elements.
    """

    def __init__(self, agreement: Agreement, kind: Any, dtype: torch.dtype, count: int) -> None:
        numbers = _FLOATS.get(dtype) or _INTEGERS[dtype]
        self._combine = (_COMBINE if dtype in _FLOATS else _COMBINE_INTEGERS)[kind]
        self._nbytes = count * dtype.itemsize
        end = _HEAD_BYTES + self._nbytes
        self._sent: Any = agreement.sent.data[_HEAD_BYTES:end]
        first, second, *others = (row[_HEAD_BYTES:end].view(numbers) for row in agreement.heard)
        self._first, self._second, self._others = first, second, others
        self._total = np.empty(count, dtype=numbers)
        self._total_bytes: Any = self._total.view(np.uint8).data
        self._divisor = agreement.size if kind == Kind.AVG else 0

    def board(self, tensor: Tensor) -> None:
        """Put a tensor's numbers into this rank's next message. The tensor must be contiguous."""
        self._sent[:] = MPI.memory.fromaddress(tensor.data_ptr(), self._nbytes)

    def arrive(self, out: Tensor) -> None:
        """Write into a tensor what the ranks' numbers come to."""
        total = self._total
        with np.errstate(all="ignore"):  # infinities and NaNs are the user's affair, as in every other sum of tensors
            self._combine(self._first, self._second, out=total)
            for other in self._others:
                self._combine(total, other, out=total)
            if self._divisor:
                np.divide(total, self._divisor, out=total)
        MPI.memory.fromaddress(out.data_ptr(), self._nbytes)[:] = self._total_bytes


class GatherRide:
    """A small all-gather whose tensors are part of the question.

    Args:
        agreement: Carries them.
        nbytes: Of each rank's tensor.
    """

    def __init__(self, agreement: Agreement, nbytes: int) -> None:
        self._nbytes, end = nbytes, _HEAD_BYTES + nbytes
        self._sent: Any = agreement.sent.data[_HEAD_BYTES:end]
        self._rows = [row.data[_HEAD_BYTES:end] for row in agreement.heard]

    def board(self, tensor: Tensor) -> None:
        """Put a tensor into this rank's next message. It must be contiguous."""
        self._sent[:] = MPI.memory.fromaddress(tensor.data_ptr(), self._nbytes)

    def arrive(self, out: Tensor) -> None:
        """Write the ranks' tensors one after the other."""
        whole: Any = MPI.memory.fromaddress(out.data_ptr(), self._nbytes * len(self._rows))
        at = 0
        for row in self._rows:
            whole[at : at + self._nbytes] = row
            at += self._nbytes


class Agreement:
    """Compares operations over the ranks of a communicator.

    Args:
        comm: The group; one thread at a time may ask.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm, self.size = comm, int(comm.size)
        self._few = self.size <= FEW
        length = _HEAD_BYTES + RIDE_BYTES
        self.sent = np.zeros(length, dtype=np.uint8)
        """This rank's message."""
        self.heard = np.zeros((self.size, length), dtype=np.uint8) if self._few else np.empty((0, 0), dtype=np.uint8)
        """Every rank's."""
        self._head = self.sent[:_HEAD_BYTES].view(np.int64)
        self._heads = self.heard.view(np.int64)[:, 0] if self._few else np.empty(0, dtype=np.int64)
        self._both = np.empty(2, dtype=np.int64)
        self._all = [self.sent, MPI.BYTE], [self.heard, MPI.BYTE]
        self._memory = [self._both, MPI.INT64_T]
        self._sum_rides: dict[tuple[Any, torch.dtype, int], SumRide | None] = {}
        self._gather_rides: dict[int, GatherRide] = {}
        self._asked = 0

    def sum_ride(self, kind: Any, dtype: torch.dtype, count: int) -> SumRide | None:
        """How an all-reduce of ``count`` numbers rides; None if it does not. The same on every rank."""
        if not self._few or not 0 < count * dtype.itemsize <= RIDE_BYTES:
            return None
        key = (kind, dtype, count)
        if key not in self._sum_rides:
            fits = (dtype in _FLOATS and kind in _COMBINE) or (dtype in _INTEGERS and kind in _COMBINE_INTEGERS)
            self._sum_rides[key] = SumRide(self, kind, dtype, count) if fits else None
        return self._sum_rides[key]

    def gather_ride(self, nbytes: int) -> GatherRide | None:
        """How an all-gather of so many bytes a rank rides; None if it does not. The same on every rank."""
        if not self._few or not 0 < nbytes <= RIDE_BYTES:
            return None
        if nbytes not in self._gather_rides:
            self._gather_rides[nbytes] = GatherRide(self, nbytes)
        return self._gather_rides[nbytes]

    def begin(self, digest: int, number: int) -> MPI.Request:
        """Ask.

        Args:
            digest: Of what must be equal on all ranks (`digest`).
            number: How many operations this rank has begun.
        """
        self._asked = asked = (digest + number * _ODD) & _MASK
        if self._few:
            self._head[0] = asked
            return self._comm.Iallgather(*self._all)
        self._both[0], self._both[1] = asked, -asked
        return self._comm.Iallreduce(MPI.IN_PLACE, self._memory, MPI.MIN)

    def reached(self) -> bool:
        """Whether all ranks asked the same, once the exchange is over."""
        asked = self._asked
        if self._few:
            heads: list[int] = self._heads.tolist()
            return heads.count(asked) == self.size
        return bool(self._both[0] == asked and self._both[1] == -asked)

    def tell_apart(self, what: str) -> None:
        """Say who called what, where the ranks did not ask the same; every rank comes by here then.

        Raises:
            Mismatch: Always.
        """
        different: dict[str, list[int]] = {}
        for rank, said in enumerate(self._comm.allgather(what)):
            different.setdefault(said, []).append(rank)
        told = "; ".join(f"ranks {ranks} of the group: {said}" for said, ranks in different.items())
        raise Mismatch(f"the ranks did not call the same operation ({told})")


def over_within(request: MPI.Request, seconds: float) -> bool:
    """Look at a request until it is over, at most for so long; say whether it is."""
    test = request.Test
    if test():
        return True
    end = time.perf_counter() + seconds
    while not test():
        if time.perf_counter() > end:
            return False
    return True


@functools.lru_cache(maxsize=4096)
def digest(key: tuple[Any, ...]) -> int:
    """A number for what must be equal on all ranks."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") & _MASK
