"""Processes that take turns by the kernel's lock on a file, which ends with the process that holds it, however that ends.

Not the library filelock: on a file system without such locks it goes on with a marker file, which a killed process
leaves behind for ever, and each use here has its own answer to that case.
"""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Callable

_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.25


class LockTimeout(Exception):
    """Another process has held the lock all the time."""


def lock(descriptor: int, *, timeout_s: float, waiting: Callable[[], None] = lambda: None) -> None:
    """Lock an open file for this process alone; closing the descriptor ends it.

    Args:
        descriptor: Of the file.
        timeout_s: Longest wait for another process, in seconds.
        waiting: Called once if another process holds the lock.

    Raises:
        LockTimeout: The time is up.
        OSError: The file system has no locks.
    """
    end = time.monotonic() + timeout_s
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _HELD:
                raise
        if pause_s == _FIRST_PAUSE_S:
            waiting()
        if time.monotonic() >= end:
            raise LockTimeout(f"another process has held the lock for {timeout_s:g} s")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
