"""Disks that are full, for tests."""

import contextlib
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file of this process can grow beyond `most` bytes: `write` fails as on a full disk.

    That holds for what pytest prints too, where its output is a file, and pytest does not survive it.
    So it belongs around the lines of a test that need it, never into a fixture: a fixture's end comes
    after pytest has written how the test went.
    """
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """`folder` lies on a file system of one MiB; where this user may not mount one, on a disk full at half of it."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        with full_disk(500_000):
            yield
        return
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
