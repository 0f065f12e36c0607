"""A folder in which one job at a time may write, on whatever host it runs.

It is a lock on a file in the folder, by fcntl's open file description. The kernel, or the NFS server for the client's kernel
(such a lock is an ordinary POSIX lock there), ends it with the process that took it, however that ends, and a process that
is merely stopped keeps it; nobody need guess from a clock. Neither of the older calls would do: a lock of `lockf` ends as soon
as this process closes any descriptor of the file (somebody copies the folder), and one of `flock` is on a file system of its
own where it is emulated. A process that is forked meanwhile (a loader's worker) would share the lock and keep it after
its parent's death, so it closes its copy at once.

On a file system without locks nothing keeps a second job out, and that is said.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import struct
import time
import weakref
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

_log = logging.getLogger(__name__)

_HELD = (errno.EAGAIN, errno.EACCES)
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_PAUSE_S = 0.1
_WHOLE_FILE = struct.pack("@hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock
_ours: weakref.WeakValueDictionary[str, FolderLock] = weakref.WeakValueDictionary()


class FolderInUse(Exception):
    """Another job has the folder; the text names it."""


class FolderLock:
    """This process's right to write in a folder, until it is released, or garbage, or the process ends."""

    def __init__(self, file: Path, descriptor: int | None) -> None:
        self._file = file
        self._descriptor = descriptor
        self._process = os.getpid()

    @property
    def holds(self) -> bool:
        """Whether the right still stands: not in a forked process, nor after somebody deleted the file."""
        if self._process != os.getpid():
            return False
        if self._descriptor is None:
            return self._file.parent.is_dir()
        return _is_there(self._file, self._descriptor)

    def release(self) -> None:
        """Give the folder up; nothing more may be written."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        if self._process == os.getpid():
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
        with suppress(OSError):
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def take(file: Path, *, wait_s: float = 0.0) -> FolderLock:
    """Take the lock of a folder, or return the one that this process has.

    Args:
        file: In the folder, both of which are made; it stays when the lock ends.
        wait_s: Longest wait for another job, in seconds: one that is just ending.

    Raises:
        FolderInUse: Another job has it.
        OSError: The file cannot be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    key = os.path.realpath(file)
    mine = _ours.get(key)
    if mine is not None and mine.holds:
        return mine
    del mine
    end = time.monotonic() + wait_s
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        except OSError as error:
            holder = _told(descriptor)
            os.close(descriptor)
            if error.errno in _WITHOUT_LOCKS:
                _log.warning(
                    "%s cannot be locked (%s): nothing keeps a second job out of it", file.parent, error.strerror
                )
                lock = FolderLock(file, None)
                break
            if error.errno not in _HELD:
                raise
            if time.monotonic() >= end:
                raise FolderInUse(holder) from None
            time.sleep(_PAUSE_S)
            continue
        if _is_there(file, descriptor):
            _tell(descriptor)
            lock = FolderLock(file, descriptor)
            break
        os.close(descriptor)  # deleted, or another one, since we opened it
    _ours[key] = lock
    return lock


def _is_there(file: Path, descriptor: int) -> bool:
    try:
        there, own = os.stat(file), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def _tell(descriptor: int) -> None:
    """Write down who holds it; for people, so that a full disk does not matter."""
    now = datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now})
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _told(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said its name yet"


def _close_in_child() -> None:
    for lock in list(_ours.values()):
        lock.release()


os.register_at_fork(after_in_child=_close_in_child)
