"""Where predictions go, sample after sample: into memory, or into files that are open to any program.

In a folder a tensor or an array becomes ``NAME.npy``, a list ``NAME.jsonl`` with a line for each sample. The folder is whole or
absent: it is written under another name first, ``NAME.partial``, by one job at a time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from hvdtrain.data.nested import parts_of
from hvdtrain.errors import ConfigError, OutputError
from hvdtrain.folder_lock import FolderInUse, FolderLock, take
from hvdtrain.training.checkpoint_files import flush
from hvdtrain.training.outputs import Column, Outputs, name_of

_LOCK = ".lock"
_claimed: set[Path] = set()  # by this process, which a lock does not keep out
_FILE_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
_WIDER = {torch.complex32: torch.complex64, torch.bfloat16: torch.float32} | {
    getattr(torch, name): torch.float32 for name in dir(torch) if name.startswith("float8_")
}


class Store(Protocol):
    """Takes the outputs of all samples, in their order."""

    def add(self, outputs: Outputs, samples: int) -> None:
        """Take those of the next samples, which fit to the first."""
        ...

    def result(self) -> Any:
        """Return what the user gets, when all are there."""
        ...

    def give_up(self) -> None:
        """Leave nothing behind."""
        ...


class InMemory:
    """Predictions of all samples as one tree of tensors, arrays and lists.

    Args:
        samples: How many there will be.
    """

    def __init__(self, samples: int) -> None:
        self._samples, self._filled = samples, 0
        self._first: Outputs | None = None
        self._columns: dict[tuple[Any, ...], Column] = {}

    def add(self, outputs: Outputs, samples: int) -> None:
        """Copy them to their place."""
        if self._first is None:
            self._first = outputs
            self._columns = {path: self._room(column) for path, column in outputs.columns.items()}
        for path, column in outputs.columns.items():
            room: Any = self._columns[path]
            if isinstance(room, list):
                room.extend(column)
            else:
                room[self._filled : self._filled + samples] = column
        self._filled += samples

    def result(self) -> Any:
        """Return the tree."""
        assert self._first is not None
        return self._first.whole(self._columns)

    def give_up(self) -> None:
        """Forget them."""
        self._columns = {}

    def _room(self, column: Column) -> Column:
        if isinstance(column, list):
            return []
        shape = (self._samples, *column.shape[1:])
        return torch.empty(shape, dtype=column.dtype) if isinstance(column, Tensor) else np.empty(shape, column.dtype)


class InFolder:
    """Predictions of all samples as files.

    Args:
        folder: It must not be there, or be empty.
        samples: How many there will be.

    Raises:
        OutputError: There is something, another job writes it just now, or nothing can be written.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self._samples = samples
        self._folder = Path(os.path.realpath(folder))  # wherever links and the working directory will lead later
        self._part = self._folder.parent / (self._folder.name + ".partial")
        self._files: dict[tuple[Any, ...], IO[bytes]] = {}
        self._lock: FolderLock | None = None
        try:
            self._refuse_what_cannot_be_replaced()
            self._claim()
        except OSError as error:
            raise self._failure(error) from error

    def add(self, outputs: Outputs, samples: int) -> None:
        """Write them.

        Raises:
            OutputError: The disk is full, or fails otherwise.
            ConfigError: They have a name that no file can have, or are of a kind that no file can hold.
        """
        try:
            if not self._files:
                self._open(outputs)
            for path, column in outputs.columns.items():
                self._files[path].write(_lines(column, path) if isinstance(column, list) else _array(column).tobytes())
        except OSError as error:
            raise self._failure(error) from error

    def result(self) -> Path:
        """Put the folder in place, and return it."""
        try:
            for file in self._files.values():
                file.close()
                flush(Path(file.name))
            self._part.replace(self._folder)
            self._release(self._folder)
            flush(self._folder.parent)
        except OSError as error:
            raise self._failure(error) from error
        return self._folder

    def give_up(self) -> None:
        """Delete what was written."""
        for file in self._files.values():
            with suppress(OSError):  # of a full disk, which has been told
                file.close()
        if self._lock is not None:
            shutil.rmtree(self._part, ignore_errors=True)
            self._release(self._part)

    def _refuse_what_cannot_be_replaced(self) -> None:
        """By the whole folder, at the end: what fails then is lost."""
        folder = self._folder
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder} is there already; name a new folder for the predictions, or delete it")
        if os.path.ismount(folder) or folder == Path.cwd():
            what = "where a disk is mounted" if os.path.ismount(folder) else "the working directory"
            raise OutputError(f"{folder} is {what}, and cannot be put in place as a whole; name a new folder in it")

    def _claim(self) -> None:
        """Take the place where they are written, which a killed run may have left behind."""
        left_by_a_run = (self._part / _LOCK).exists()
        if self._part.exists() and not left_by_a_run and (not self._part.is_dir() or any(self._part.iterdir())):
            raise OutputError(
                f"{self._part}, where the predictions are written first, is something else; move it away, or name another folder"
            )
        if self._part in _claimed:
            raise OutputError(f"{self._folder} is being written by this process already; name another folder")
        try:
            self._lock = take(self._part / _LOCK)
        except FolderInUse as holder:
            raise OutputError(
                f"{self._folder} is being written by another job, {holder}; wait for it, end it, or name another folder"
            ) from None
        _claimed.add(self._part)
        for file in self._part.iterdir():
            if file.name != _LOCK:
                file.unlink()

    def _release(self, folder: Path) -> None:
        """Nobody writes there any more."""
        if self._lock is not None:
            (folder / _LOCK).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None
            _claimed.discard(self._part)

    def _open(self, outputs: Outputs) -> None:
        taken = set()
        for path, column in outputs.columns.items():
            name = name_of(path)
            if not _FILE_NAME.fullmatch(name) or name.lower() in taken:
                raise ConfigError(
                    f"predictions are written to a file for each name, and {name!r} cannot be one, or is there twice; rename it in the "
                    "task's predict()"
                )
            taken.add(name.lower())
            file = self._files[path] = (self._part / (name + (".jsonl" if isinstance(column, list) else ".npy"))).open(
                "wb"
            )
            if not isinstance(column, list):
                array = _array(column)
                header = {
                    "descr": np.lib.format.dtype_to_descr(array.dtype),
                    "fortran_order": False,
                    "shape": (self._samples, *array.shape[1:]),
                }
                np.lib.format.write_array_header_2_0(file, header)

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(f"predictions cannot be written to {self._folder}: {error.strerror or error}")


def _array(column: Any) -> np.ndarray[Any, Any]:
    """A column as NumPy has it: what it has no type for becomes a wider one, which holds all its values."""
    if isinstance(column, Tensor):
        column = column.to(_WIDER.get(column.dtype, column.dtype)).resolve_conj().resolve_neg().numpy()
    if column.dtype.hasobject:
        raise ConfigError("an array of Python objects cannot be written to a .npy file; return a list instead")
    return cast("np.ndarray[Any, Any]", np.ascontiguousarray(column))


def _lines(column: list[Any], path: tuple[Any, ...]) -> bytes:
    try:
        return "".join(json.dumps(entry, default=_plain, ensure_ascii=False) + "\n" for entry in column).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"predictions of {name_of(path)} cannot be written as JSON: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    parts = parts_of(value)
    if parts is None:
        raise TypeError(f"a {type(value).__name__} has no form in it")
    return parts
