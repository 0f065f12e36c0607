"""Small files that are there whole or not at all: written beside, then renamed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hvdtrain.errors import OutputError


def write_whole(path: Path, text: str | bytes, *, remedy: str = "choose another --run-dir") -> None:
    """Put ``text`` into a file, which keeps its old content until the new one is complete; its folder is made.

    Args:
        path: The file.
        text: Its content; in UTF-8, if it is text.
        remedy: What else the message says to do, besides freeing space.

    Raises:
        OutputError: It cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(text.encode() if isinstance(text, str) else text)
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise OutputError(f"could not write {path}: {error.strerror}; free space there, or {remedy}") from error


def write_output(path: Path, text: str | bytes, *, remedy: str) -> None:
    """As `write_whole`, for a path that somebody typed: a device or a pipe is written into, and a link stays one.

    Raises:
        OutputError: It cannot be written.
    """
    if not _is_stream(path):
        write_whole(path.resolve(), text, remedy=remedy)
        return
    try:
        with path.open("ab") as opened:
            opened.write(text.encode() if isinstance(text, str) else text)
    except OSError as error:
        raise OutputError(f"could not write {path}: {error.strerror}; {remedy}") from error


def check_writable(path: Path, *, remedy: str) -> None:
    """See, before the work that is to go there, that `write_output` could write this file; its folder is made.

    Raises:
        OutputError: It could not.
    """
    if path.is_dir():
        raise OutputError(f"could not write {path}: it is a folder; {remedy}")
    if _is_stream(path):
        if not os.access(path, os.W_OK):
            raise OutputError(f"could not write {path}: Permission denied; {remedy}")
        return
    path = path.resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(b"")
        beside.unlink()
    except OSError as error:
        raise OutputError(f"could not write {path}: {error.strerror}; {remedy}") from error


def _is_stream(path: Path) -> bool:
    """Whether a path is a device, a pipe, or the name of an open file: to be written into, not replaced."""
    opened = path.absolute().parts[1:3] in (("dev", "stdout"), ("dev", "stderr"), ("dev", "fd"), ("proc", "self"))
    return path.exists() and (opened or not (path.is_file() or path.is_dir()))
