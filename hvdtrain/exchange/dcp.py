"""Folders of ``torch.distributed.checkpoint`` (DCP), written and read by one process.

DCP's own reader unpickles its ``.metadata`` and every value that is no tensor, whatever they hold. Here the first is read by
an unpickler that knows DCP's own records and nothing else, and the rest with ``weights_only=True``.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from hvdtrain.errors import CheckpointError
from hvdtrain.exchange.files import check_torch

METADATA = ".metadata"
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}  # fmt: skip


def write_dcp(found: Mapping[str, Any], folder: Path) -> None:
    """Write dictionaries of tensors and plain values; ``torch.distributed.checkpoint.load`` reads them.

    Args:
        found: What to write.
        folder: Made anew.

    Raises:
        OSError: It could not be written.
    """
    try:
        with _one_process():
            dcp.save(dict(found), storage_writer=FileSystemWriter(folder, sync_files=True))
    except CheckpointException as error:  # no Exception: it would pass by whoever catches those
        raise OSError(_cause(error)) from error


def read_dcp(folder: Path, *, trusted: bool) -> dict[str, Any]:
    """Read all of a DCP folder, however many ranks wrote it, into the dictionaries that it was written from.

    Args:
        folder: With a ``.metadata``.
        trusted: As for `read_torch`.

    Raises:
        CheckpointError: It is damaged, holds more than tensors and plain values, or this torch is too old.
    """
    check_torch(str(torch.__version__), str(folder), trusted=trusted)
    metadata = _metadata(folder)
    try:
        flat = {name: _room(kind) for name, kind in metadata.state_dict_metadata.items()}
        planner = _Planner()
        with _one_process():
            dcp.load(dict(flat), storage_reader=_Reader(folder, metadata), planner=planner)
        flat |= planner.values
        return _nested(flat, metadata.planner_data or {})
    except (Exception, CheckpointException) as error:  # the second is DCP's wrapper of the first, and none itself
        raise CheckpointError(f"{folder} cannot be read: {_cause(error)}") from error


class _Records(pickle.Unpickler):
    """Knows the records that a ``.metadata`` is made of, and no function that does anything."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member  # how Python before 3.11.4 and 3.12 pickles an enumeration's member
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no DCP metadata needs")


def _member(kind: Any, name: str) -> Any:
    """A member of an enumeration, and nothing else that getattr would give."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError("it asks for an attribute, which no DCP metadata needs")


class _Reader(FileSystemReader):
    """Reads a folder whose metadata has been read, and checked, already."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._known = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._known


class _Planner(DefaultLoadPlanner):
    """Fills tensors by their flat names, and keeps what is no tensor in `values`."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)
        self.values: dict[str, Any] = {}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.values[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


@contextmanager
def _one_process() -> Iterator[None]:
    """DCP warns that it does not run on ranks, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _metadata(folder: Path) -> Metadata:
    file = folder / METADATA
    try:
        with file.open("rb") as stream:
            metadata = _Records(stream).load()
        if not isinstance(metadata, Metadata) or not metadata.storage_data:
            raise CheckpointError(f"{file} is no metadata of torch.distributed.checkpoint")
        for place in metadata.storage_data.values():
            relative = PurePosixPath(place.relative_path)
            if relative.is_absolute() or ".." in relative.parts:
                raise CheckpointError(f"{file} names a file outside of its folder: {place.relative_path}")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise CheckpointError(f"{file} cannot be read: {_cause(error)}") from error
    return metadata


def _room(kind: Any) -> Any:
    if isinstance(kind, TensorStorageMetadata):
        return torch.empty(kind.size, dtype=kind.properties.dtype)
    return None


def _nested(flat: Mapping[str, Any], paths: Mapping[str, tuple[str | int, ...]]) -> dict[str, Any]:
    """Dictionaries and lists as they were flattened: text is a dictionary's key, a number a list's index."""
    whole: dict[str, Any] = {}
    for name in sorted(flat, key=lambda name: [(isinstance(key, str), key) for key in paths.get(name, (name,))]):
        path = paths.get(name, (name,))
        at: Any = whole
        for key, following in pairwise(path):
            empty: Any = [] if isinstance(following, int) else {}
            at = at.setdefault(key, empty) if isinstance(at, dict) else _at(at, key, empty)
        if isinstance(at, dict):
            at[path[-1]] = flat[name]
        else:
            _at(at, path[-1], flat[name])
    return whole


def _at(items: list[Any], index: Any, value: Any) -> Any:
    """The item of a list, which is ``value`` if the list ends there."""
    if index == len(items):
        items.append(value)
    return items[index]


def _cause(error: BaseException) -> str:
    failures = getattr(error, "failures", None) or {}  # CheckpointException: by rank, with their tracebacks
    inner = next((one[0] for one in failures.values()), error)
    text = str(inner).strip().splitlines()
    return (text[0][:300] if text else "") or type(inner).__name__
