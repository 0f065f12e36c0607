"""Work that does not queue in a lane: messages between two ranks, and several operations as one."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from hvdtrain.mpi import operations
from hvdtrain.mpi.dtypes import as_bytes, memory
from hvdtrain.mpi.lane import MpiWork


class MpiMessage(MpiWork):
    """A message between two ranks, in pieces that MPI can count; `wait` drives it.

    Args:
        what: The message, for messages of errors.
        tensor: What is sent or received.
        host: The memory that MPI works on.
        timeout_s: Bound of the whole, in seconds.
        given_up: Says why nobody need wait any more, once that is so.
    """

    def __init__(
        self,
        what: str,
        tensor: Tensor,
        host: Tensor,
        timeout_s: float,
        *,
        given_up: Callable[[], Exception | None] = lambda: None,
    ) -> None:
        super().__init__(what, [tensor], timeout_s)
        self._given_up = given_up
        self._host = host
        self._requests: list[MPI.Request] = []
        self._sizes: list[int] = []
        self._sends = False
        self._deadline = time.monotonic() + timeout_s
        self._poll_turn = threading.Lock()
        self.on_arrival: Callable[[], None] = lambda: None

    def begin(self, call: Callable[..., Any], peer: int, tag: int, *, sends: bool) -> None:
        """Start it, by one of a communicator's Isend, Issend and Irecv."""
        flat = as_bytes(self._host)
        self._sends = sends
        for start in range(0, max(1, flat.numel()), operations.MAX_COUNT):
            count = min(operations.MAX_COUNT, flat.numel() - start)
            part = memory(flat, start, count)
            self._sizes.append(count)
            self._requests.append(call(part, peer, tag))

    def poll(self) -> bool:
        """Look whether it is over."""
        with self._poll_turn:
            if self._over:
                return True
            status = MPI.Status()
            try:
                while self._requests:
                    if not self._requests[0].Test(status):
                        if time.monotonic() > self._deadline:
                            self.finish(dist.DistBackendError(f"{self.what} timed out after {self.timeout_s:g} s"))
                            return True
                        reason = self._given_up()
                        if reason is not None:
                            self.finish(dist.DistBackendError(f"{self.what}: {reason}"))
                            return True
                        return False
                    self._requests.pop(0)
                    size = self._sizes.pop(0)
                    if not self._sends:
                        self.source = status.Get_source()
                        if status.Get_count(MPI.BYTE) != size:
                            raise operations.Mismatch(f"{status.Get_count(MPI.BYTE)} bytes came, {size} were expected")
                self.on_arrival()
            except Exception as error:
                failure = dist.DistBackendError(f"{self.what} failed: {error}")
                failure.__cause__ = error
                self.finish(failure)
                return True
            self.finish()
            return True

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Block until the message has gone, or come."""
        limit = timeout.total_seconds()
        end = time.monotonic() + limit if limit > 0 else math.inf
        pause = 0.0
        for turn in itertools.count():
            if self.poll():
                break
            if time.monotonic() > end:
                raise dist.DistBackendError(f"{self.what}: waited {limit:g} s, timed out")
            if turn > 50:
                pause = min(0.001, 1e-5 + pause * 1.05)
            time.sleep(pause)
        return super().wait()

    def is_completed(self) -> bool:
        """Look whether it is over, well or badly."""
        return self.poll()

    def is_success(self) -> bool:
        """Look whether it is over and well."""
        return self.poll() and super().is_success()

    def get_future(self) -> Any:
        """A future of the result; it blocks, since nothing drives a message but its own `wait`."""
        self.wait()
        return super().get_future()


class Several(MpiWork):
    """Several operations as one."""

    def __init__(self, what: str, works: Sequence[MpiWork], tensors: Sequence[Tensor], timeout_s: float) -> None:
        super().__init__(what, tensors or [t for work in works for t in work._tensors], timeout_s)
        self._works = list(works)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Block until all are over."""
        for work in self._works:
            work.wait(timeout)
        self.finish()
        return True

    def is_completed(self) -> bool:
        """Say whether all are over."""
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        """Say whether all are over and well."""
        return all(work.is_success() for work in self._works)

    def exception(self) -> Exception | None:
        """The first error, if there is one."""
        return next((work.exception() for work in self._works if work.exception() is not None), None)

    def get_future(self) -> Any:
        """A future of all results."""
        tensors = self._tensors
        futures = [work.get_future() for work in self._works]
        return torch.futures.collect_all(futures).then(lambda done: [[f.value() for f in done.value()], tensors][1])
