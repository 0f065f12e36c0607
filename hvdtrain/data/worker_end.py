"""Loader processes end with their rank, however it ends: they would hold its output open, and its launcher would wait for it.

torch's own loader processes look for their rank between two batches. One that is inside a sample, or was stopped, does not
look, and a rank that was killed can tell nobody. So the kernel is asked, in each loader process, to kill it when the rank is
gone; and a rank that ends by itself does not wait for long for those that do not.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from hvdtrain.data.worker_signals import rank_is_ending

GRACE_S = 1.0
"""How long a rank that ends waits for loader processes before it kills them."""
_POLL_S = 0.5
_PR_SET_PDEATHSIG = 1

_workers: set[BaseProcess] = set()


class EndWithRank:
    """For ``worker_init_fn`` of a `DataLoader`.

    Args:
        start_method: How loader processes begin.
    """

    def __init__(self, start_method: str) -> None:
        self._served = start_method == "forkserver"  # the parent is a server

    def __call__(self, worker: int) -> None:
        """Run in loader process ``worker`` before it loads anything."""
        parent = os.getppid()
        if sys.platform == "linux" and _begun_by_main_thread(parent):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        else:
            threading.Thread(target=_follow, args=(parent,), name="end-with-rank", daemon=True).start()
        rank = multiprocessing.parent_process()
        if self._served and rank is not None:
            threading.Thread(target=_end_server, args=(rank.sentinel, parent), name="end-server", daemon=True).start()
        expected = parent if self._served or rank is None else rank.pid
        if os.getppid() != expected or expected == 1:  # it went before the kernel was asked
            os._exit(0)


def note(before: list[BaseProcess]) -> None:
    """See to the loader processes that have begun since ``before``, the children that this process had.

    Called whenever a loader has begun to iterate: what is registered last runs first at exit, before torch's own patience.
    """
    _workers.difference_update([one for one in _workers if one.exitcode is not None])
    _workers.update(set(multiprocessing.active_children()) - set(before))
    if _workers:
        atexit.unregister(end_workers)
        atexit.register(end_workers, os.getpid())


def end_workers(pid: int | None = None) -> None:
    """End this process's loader processes, which takes `GRACE_S` and a moment at most.

    Args:
        pid: Of the process whose they are; nothing happens in another, forked one.
    """
    if pid not in (None, os.getpid()):
        return
    rank_is_ending()
    alive = [one for one in _workers if one.exitcode is None]
    if alive and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed loader process for an accident
    for process in alive:
        process.terminate()
    end = time.monotonic() + GRACE_S
    for process in alive:
        process.join(max(0.0, end - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join(GRACE_S)
    _workers.clear()


def _begun_by_main_thread(parent: int) -> bool:
    """Whether the parent's main thread began this process: the kernel's signal comes when that *thread* ends."""
    try:
        return str(os.getpid()) in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return False


def _end_server(rank: int, server: int) -> None:
    """The fork server lives as long as any of its children: when the rank is gone, it and with it all of them are killed."""
    connection.wait([rank])
    if os.getppid() == server != 1:
        os.kill(server, signal.SIGKILL)
    os._exit(0)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(0)
