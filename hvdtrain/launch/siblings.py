"""Which ranks of this node have no process any more, before they could say so themselves.

A launcher gives each process that it starts the rank's variables, and the kernel shows them for the user's own processes
(``/proc``). A rank of which no process is left has ended, whatever its exit code was. Nothing here is needed to run: where
``/proc`` does not show other processes, no rank is ever said to have ended.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

from hvdtrain.errors import HvdtrainError
from hvdtrain.launch.detect import Detection, detect

_GONE_S = 2.5  # for how long a rank must have had no process: launchers start their ranks one after the other


class Siblings:
    """The ranks of one node, as far as they all are on it.

    Args:
        detection: This process's own.
    """

    def __init__(self, detection: Detection) -> None:
        self._absent_since: dict[int, float] = {}
        self._own = detection
        topology = detection.topology
        mine = _detected(os.getpid()) if topology.num_nodes == 1 and topology.world_size > 1 else None
        # Launchers within launchers: without the process tree, the variables might be taken for another one's.
        self._visible = (
            mine is not None and mine.job_id == detection.job_id and mine.topology.rank == detection.topology.rank
        )

    def ended(self, awaited: Collection[int]) -> list[int]:
        """Those of some ranks that had no process for a while; to be asked again and again."""
        if not self._visible:
            return []
        now = time.monotonic()
        alive = self.alive()
        for rank in awaited:
            if rank in alive:
                self._absent_since.pop(rank, None)
            else:
                self._absent_since.setdefault(rank, now)
        return [rank for rank in awaited if now - self._absent_since.get(rank, now) >= _GONE_S]

    def alive(self) -> set[int]:
        """The ranks of this job that have a process on this node."""
        return {rank for rank, _ in self._processes()}

    def end_stopped(self) -> None:
        """End processes of this job that are stopped: a launcher's SIGTERM does not reach them."""
        if not self._visible:
            return
        for _, pid in self._processes():
            with suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "T":
                    os.kill(pid, signal.SIGKILL)

    def _processes(self) -> Iterator[tuple[int, int]]:
        for entry in os.listdir("/proc"):
            other = _detected(int(entry)) if entry.isdigit() else None
            if other is not None and other.job_id == self._own.job_id:
                yield other.topology.rank, int(entry)


def _detected(pid: int) -> Detection | None:
    """What a process's variables say about it; None if it has none, is gone, or is another user's."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    if b"RANK=" not in content and b"SLURM_PROCID=" not in content:
        return None
    environ = dict(os.fsdecode(entry).partition("=")[::2] for entry in content.split(b"\0") if entry)
    try:
        return detect(environ)
    except HvdtrainError:
        return None
