"""Where predictions go, sample after sample: into memory, or into files that are open to any program.

In a folder a tensor or an array becomes ``NAME.npy``, a list ``NAME.jsonl`` with a line for each sample. The folder is whole or
absent: it is written under another name first.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from hvdtrain.data.nested import parts_of
from hvdtrain.errors import ConfigError, OutputError
from hvdtrain.training.outputs import Column, Outputs, name_of

_FILE_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
_AS_FLOAT32 = (torch.bfloat16, *(getattr(torch, name) for name in dir(torch) if name.startswith("float8_")))


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
        OutputError: There is something, or nothing can be written.
    """

    def __init__(self, folder: Path, samples: int) -> None:
        self._folder, self._samples = folder, samples
        self._part = folder.with_name(folder.name + ".partial")
        self._files: dict[tuple[Any, ...], IO[bytes]] = {}
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise OutputError(f"{folder} is there already; name a new folder for the predictions, or delete it")
            shutil.rmtree(self._part, ignore_errors=True)
            self._part.mkdir(parents=True)
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
            self._part.replace(self._folder)
        except OSError as error:
            raise self._failure(error) from error
        return self._folder

    def give_up(self) -> None:
        """Delete what was written."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._part, ignore_errors=True)

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
    """A column as NumPy has it: what it has no type for becomes float32, which holds all its values."""
    if isinstance(column, Tensor):
        column = (column.float() if column.dtype in _AS_FLOAT32 else column).resolve_conj().resolve_neg().numpy()
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
