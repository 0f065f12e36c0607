"""Getting the files of a data set onto a node, once, however many ranks ask for them.

Every rank calls `once_per_node`. A lock on the data folder lets one of them work; the others wait, with a bound, and
then find the files there or learn why they are not. The kernel drops the lock of a process that dies, so that a killed
rank leaves neither a stale lock nor, because files are put in place whole, half a file. Where nodes share the folder,
one rank of all of them works. No rank needs to know its number, and nobody needs to call this at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import http.client
import logging
import os
import shutil
import tarfile
import urllib.request
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.errors import DataError
from hvdtrain.file_lock import LockTimeout, lock

_log = logging.getLogger(__name__)

_SILENCE_S = 30.0  # of a server, before a download is given up
_CHUNK_BYTES = 1 << 18
_TAR_FILTER: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.10.12
_NO_WRITING = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A file to download and unpack.

    Args:
        name: Path below the data folder; ``.gz`` holds the file of the name without it, ``.tar.gz`` any number of files.
        sha256: Of the file as downloaded.
        urls: Where it can be had, the first that works is taken.
        contents: What it holds, unpacked beside it: paths below the data folder.
    """

    name: str
    sha256: str
    urls: tuple[str, ...]
    contents: tuple[str, ...]


def once_per_node(
    name: str, folder: Path, *, is_there: Callable[[], bool], get: Callable[[], None], timeout_s: float
) -> None:
    """Call ``get`` in one process if ``is_there`` says no, while the others that use this folder wait.

    Args:
        name: Of the data set; one lock each.
        folder: Where the data sets are; made if it is missing.
        is_there: Whether there is nothing to do. Called while no other process is at work.
        get: Gets it, or raises a DataError.
        timeout_s: Longest wait for another process, in seconds.

    Raises:
        DataError: ``get`` failed, here or in the process that this one waited for; or the wait was too long.
    """
    failure = folder / f".hvdtrain-{name}.failed"
    before = _read_text(failure)
    with one_at_a_time(name, folder, timeout_s) as writable:
        if is_there():
            return
        after = _read_text(failure)
        if after != before and after:  # it failed while this process waited; the next attempt will try again
            raise DataError(after.partition("\n")[2])
        if not writable:
            raise DataError(
                f"{name} is not in {folder.absolute()}, which cannot be written to; choose another --data-dir"
            )
        try:
            get()
        except DataError as error:
            with contextlib.suppress(OSError):
                failure.write_text(f"{uuid.uuid4()}\n{error}")
            raise
        with contextlib.suppress(OSError):
            failure.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(name: str, folder: Path, timeout_s: float) -> Iterator[bool]:
    """Hold the data set's lock; gives whether the folder can be written to (if not, nothing is locked).

    Args:
        name: Of the data set; one lock each.
        folder: Where the data sets are; made if it is missing.
        timeout_s: Longest wait for another process, in seconds.

    Raises:
        DataError: The wait was too long, or the folder cannot be used.
    """
    path = folder / f".hvdtrain-{name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in _NO_WRITING:
            raise DataError(
                f"cannot use {folder.absolute()} for data sets: {error}; choose another --data-dir"
            ) from error
        yield False
        return
    try:
        _take_turns(descriptor, name, folder, timeout_s)
        yield True
    finally:
        os.close(descriptor)


def _take_turns(descriptor: int, name: str, folder: Path, timeout_s: float) -> None:
    try:
        lock(descriptor, timeout_s=timeout_s)
    except LockTimeout as error:
        raise DataError(
            f"waited {timeout_s:g} s for another process to download {name} to {folder.absolute()}; give it more "
            "time with --timeout, or download beforehand with one process"
        ) from error
    except OSError as error:
        raise DataError(
            f"the file system of {folder.absolute()} has no file locks ({error}), so that ranks cannot take turns "
            f"there; download {name} beforehand with one process, or choose another --data-dir"
        ) from error


def fetch_and_unpack(archives: Sequence[Archive], folder: Path) -> None:
    """Put what the archives hold into ``folder``, whole files only; archives that lie there already are used.

    Only one process may call this for a folder at a time, see `once_per_node`.

    Raises:
        DataError: An archive cannot be downloaded, or is not the expected one.
    """
    staging = folder / ".hvdtrain-partial"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for archive in archives:
            if not all((folder / path).is_file() for path in archive.contents):
                file = folder / archive.name
                if not is_intact(file, archive.sha256):
                    file = _download(archive, staging)
                _unpack(file, staging, (folder / archive.name).parent)
    except OSError as error:
        raise DataError(f"cannot write to {folder.absolute()}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def is_intact(file: Path, sha256: str) -> bool:
    """Return whether a file is there with this SHA-256 sum."""
    if not file.is_file():
        return False
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == sha256


def _download(archive: Archive, staging: Path) -> Path:
    file = staging / Path(archive.name).name
    failures = []
    for url in archive.urls:
        _log.info("downloading %s", url)
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "hvdtrain"})
            with urllib.request.urlopen(request, timeout=_SILENCE_S) as response, file.open("wb") as stream:
                shutil.copyfileobj(response, stream, _CHUNK_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: not a URL
            failures.append(f"{url}: {error}")
            continue
        if is_intact(file, archive.sha256):
            return file
        failures.append(f"{url}: not the expected file ({file.stat().st_size} bytes, SHA-256 is not {archive.sha256})")
    raise DataError("; ".join(failures))


def _unpack(file: Path, staging: Path, target: Path) -> None:
    unpacked = staging / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir()
    try:
        if file.name.endswith(".tar.gz"):
            with tarfile.open(file) as tar:
                tar.extractall(unpacked, **_TAR_FILTER)
        else:
            with gzip.open(file) as packed, (unpacked / file.name.removesuffix(".gz")).open("wb") as stream:
                shutil.copyfileobj(packed, stream, _CHUNK_BYTES)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be unpacked: {error}; delete it") from error
    for content in [path for path in unpacked.rglob("*") if path.is_file()]:
        place = target / content.relative_to(unpacked)
        place.parent.mkdir(parents=True, exist_ok=True)
        content.replace(place)


def _read_text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
