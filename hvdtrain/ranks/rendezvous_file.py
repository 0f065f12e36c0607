"""The small file that says where rank 0 is and what the job's secret is: written and believed only where nobody else could have."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hvdtrain.errors import LaunchError
from hvdtrain.launch.detect import Detection
from hvdtrain.launch.environment import given

_STALE_S = 600.0
DIRECTORY_VARIABLE = "HVDTRAIN_RENDEZVOUS_DIR"


def rendezvous_file(detection: Detection) -> Path:
    """Where rank 0 writes, and the others read.

    Raises:
        LaunchError: The folder is not this user's alone, or cannot be had.
    """
    chosen = given(DIRECTORY_VARIABLE)
    if chosen and detection.topology.num_nodes > 1:
        folder = Path(chosen)
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
    elif detection.topology.num_nodes > 1:
        folder = _private(Path.cwd() / ".hvdtrain-rendezvous")  # a job's working directory is on the shared file system
    else:
        folder = private_folder()
    return folder / f"{detection.job_id}.json"


def private_folder() -> Path:
    """This user's folder in the temporary directory.

    Raises:
        LaunchError: It is not this user's alone, or cannot be had.
    """
    with _explained("a temporary folder"):  # Python's own tries whether it can be written to
        temporary = Path(tempfile.gettempdir())
    return _private(temporary / f"hvdtrain-{os.getuid()}")


@contextmanager
def _explained(place: Path | str) -> Iterator[None]:
    """Say what a full disk, or one that cannot be written to, is needed for."""
    try:
        yield
    except OSError as error:
        raise LaunchError(
            f"could not write to {place}, where the ranks find each other: {error}; free some space, or set TMPDIR, or for "
            f"several nodes {DIRECTORY_VARIABLE}, to a private folder that can be written to"
        ) from error


def _private(folder: Path) -> Path:
    with _explained(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise LaunchError(
            f"{folder} must belong to you and be private (mode 0700); remove it, or set TMPDIR, or for several nodes "
            f"{DIRECTORY_VARIABLE}, to a private folder"
        )
    return folder


def sweep(folder: Path) -> None:
    """Remove what jobs left in the private folder of which no process could remove it: all were killed at once.

    A socket goes if nobody listens on it, a file if its socket is gone, both only when they are `_STALE_S` seconds old.
    """
    with suppress(OSError):
        found = [(file, file.lstat()) for file in folder.iterdir()]
        old = [(file, status.st_mode) for file, status in found if status.st_mtime < time.time() - _STALE_S]
        for file in (file for file, mode in old if file.suffix == ".store" and stat.S_ISSOCK(mode)):
            if _is_deaf(file):
                file.unlink(missing_ok=True)
        for file in (file for file, mode in old if file.suffix == ".json" and stat.S_ISREG(mode)):
            with suppress(LaunchError, ValueError, KeyError, TypeError):
                if (path := read(file)["path"]) and not Path(path).exists():
                    file.unlink(missing_ok=True)


def _is_deaf(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.setblocking(False)
        try:
            asking.connect(str(path))
        except OSError as error:
            return error.errno == errno.ECONNREFUSED
    return False


def write(file: Path, content: object) -> None:
    """Write a file that nobody else can read; whole or not at all.

    Raises:
        LaunchError: It cannot be written.
    """
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    with _explained(file.parent):
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as target:
            json.dump(content, target)
        temporary.replace(file)


def read(file: Path) -> dict[str, Any]:
    """What rank 0 wrote.

    Raises:
        OSError: There is nothing.
        LaunchError: Somebody else has written it, or could have.
    """
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW)) as source:
        status = os.fstat(source.fileno())
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise LaunchError(
                f"{file} tells where rank 0 is, and must belong to you and be private (mode 0600); it belongs to user "
                f"{status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}. Remove it, or set {DIRECTORY_VARIABLE} to a private folder"
            )
        place: dict[str, Any] = json.load(source)
    return place
