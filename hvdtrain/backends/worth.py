"""Whether a compression saves more time than it takes, where the ranks share a machine: measured in a few steps, said once if not."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hvdtrain.backends.base import Backend

_log = logging.getLogger(__name__)

_STEPS = 5  # that are measured, the first of which is left out
_MOST_BYTES = 32 * 2**20  # of what is sent to see how long it takes


class Worth:
    """Times a compression's part of the first steps, and what gradients would take as they are.

    The quickest step counts: the others wait for other ranks, or for what else the machine does.

    Args:
        backend: All ranks.
        name: The compression's.
        after: Steps before it begins.

    Attributes:
        is_open: It is not known yet; never on several nodes, nor in a world of one.
    """

    def __init__(self, backend: Backend, name: str, after: int = 0) -> None:
        self._backend, self._name, self._after = backend, name, after
        self.is_open = backend.topology.num_nodes == 1 and backend.world_size > 1
        self._spent_s = 0.0
        self._steps_s: list[float] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Surround what would not be without the compression, and what is in the place of the plain exchange."""
        if not self.is_open:
            yield
            return
        began = self._now()
        try:
            yield
        finally:
            self._spent_s += self._now() - began

    def end_step(self, size_bytes: int) -> None:
        """After a step's exchange; every rank must call it.

        Args:
            size_bytes: Of the gradients that were compressed.
        """
        if not self.is_open:
            return
        spent_s, self._spent_s = self._spent_s, 0.0
        if self._after > 0:
            self._after -= 1
            return
        self._steps_s.append(spent_s)
        if len(self._steps_s) < _STEPS:
            return
        self.is_open = False
        said = verdict(self._name, min(self._steps_s[1:]), self._plain_s(size_bytes))
        if said and self._backend.rank == 0:
            _log.warning("%s", said)

    def _plain_s(self, size_bytes: int) -> float:
        """Seconds in which as many bytes are summed as they are; every rank must call it. They are not counted as traffic."""
        traffic, wire = self._backend.traffic, self._backend.wire
        sent = traffic.sent_bytes
        zeros = torch.zeros(max(1, min(size_bytes, _MOST_BYTES) // 4), device=wire.device)
        took = []
        for _ in range(3):
            wire.barrier().wait()
            began = self._now()
            wire.all_reduce_(zeros, "sum").wait()
            took.append(self._now() - began)
        traffic.sent_bytes = sent
        return min(took) * max(1.0, size_bytes / zeros.nbytes)

    def _now(self) -> float:
        if self._backend.device.type == "cuda":
            torch.cuda.synchronize(self._backend.device)
        return time.perf_counter()


def verdict(name: str, compressed_s: float, plain_s: float) -> str:
    """What is to be said of a compression that takes so many seconds a step, where plain gradients take so many; "" if it is worth it."""
    if compressed_s <= plain_s:
        return ""
    return (
        f"compression {name} takes {1000 * compressed_s:.3g} ms a step here, and gradients as they are would take {1000 * plain_s:.3g} ms: "
        "between ranks on one machine it costs more than it saves; leave compression= (--compression) out"
    )
