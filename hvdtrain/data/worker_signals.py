"""Loader processes that outlive a SIGTERM to the whole job, so that their rank can finish its step and save.

Slurm and others send SIGTERM to every process of a job that is to end. A rank catches it, finishes the step and writes
a checkpoint; torch's loader processes die of it, and the rank then fails in the middle of the step instead. Here they
go on for as long as their rank needs them.

A loader process still ends with its rank: when the loader is closed (torch's own way), when the rank exits (Python then
terminates its child processes and waits for them, so that SIGTERM must work again), and when the rank is gone.

Not so with the start method "forkserver", Python 3.14's default: SIGTERM ends the fork server, and with it the loader
processes. ``multiprocessing.set_start_method("fork")`` or "spawn" in the training script keeps them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from typing import Any

_POLL_S = 0.1

_ending_flags: dict[int, Any] = {}  # by process: a forked one must not think that its parent's exit is its own


class OutliveSigterm:
    """For ``worker_init_fn`` of a `DataLoader`; make it in the rank's process."""

    def __init__(self) -> None:
        self._rank_is_ending = _ending_flag()
        self._parent_pid = 0
        self._asked = False

    def __call__(self, worker: int) -> None:
        """Run in loader process ``worker`` before it loads anything."""
        self._parent_pid = os.getppid()
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: object) -> None:
        if self._rank_has_ended():
            os._exit(0)
        if not self._asked:
            self._asked = True
            threading.Thread(target=self._end_with_rank, name="end-with-rank", daemon=True).start()

    def _end_with_rank(self) -> None:
        while not self._rank_has_ended():
            time.sleep(_POLL_S)
        os._exit(0)

    def _rank_has_ended(self) -> bool:
        return self._rank_is_ending.value or os.getppid() != self._parent_pid


def rank_is_ending() -> None:
    """Let a SIGTERM end this process's loader processes from now on."""
    if os.getpid() in _ending_flags:
        _raise_flag(_ending_flags[os.getpid()])


def _ending_flag() -> Any:
    """Shared memory that becomes true when this process begins to exit, before it terminates its children."""
    pid = os.getpid()
    if pid not in _ending_flags:
        flag = RawValue(ctypes.c_bool, False)
        _ending_flags[pid] = flag
        Finalize(None, _raise_flag, args=(flag,), exitpriority=1000)
    return _ending_flags[pid]


def _raise_flag(flag: Any) -> None:
    flag.value = True
