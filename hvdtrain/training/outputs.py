"""What a model gives for a batch, taken apart so that batches can be put together again in the order of the samples.

Tuples, mappings and dataclasses are walked through (`hvdtrain.data.nested`). A tensor or an array has a sample in each row; a
list has an entry for each sample: that is for texts, and for what is not equally large for all samples.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdtrain.data.nested import parts_of, step_into, to_device, with_parts
from hvdtrain.errors import ConfigError

Column = Tensor | np.ndarray[Any, Any] | list[Any]
"""One leaf of the outputs, with a row or an entry for each sample."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of some samples.

    Attributes:
        columns: On the CPU, by the keys that lead there.
        shape: The same tree, with None for each column.
    """

    columns: dict[tuple[Any, ...], Column]
    shape: Any

    def whole(self, columns: Mapping[tuple[Any, ...], Column]) -> Any:
        """Return the tree with other columns."""
        return _filled(self.shape, columns, ())


def taken_apart(output: Any, samples: int) -> Outputs:
    """Return what a batch of so many samples gave, copied to the CPU.

    Raises:
        ConfigError: It does not show which part of it belongs to which sample.
    """
    columns: dict[tuple[Any, ...], Column] = {}
    shape = _take(output, samples, columns, (), "output")
    if not columns:
        raise ConfigError(f"a prediction must hold a tensor, an array or a list, and is a {type(output).__name__}")
    return Outputs(columns, shape)


def difference(first: Outputs, later: Outputs) -> str:
    """In what the outputs of two batches cannot be put together; "" if they can."""
    if first.columns.keys() != later.columns.keys():
        return f"some hold {names(first)}, others {names(later)}"
    for path, column in first.columns.items():
        ours, theirs = _kind(column), _kind(later.columns[path])
        if ours != theirs:
            return f"{name_of(path)} is {ours} for some, and {theirs} for others"
    return ""


def names(outputs: Outputs) -> str:
    """The columns, for messages."""
    return ", ".join(map(name_of, outputs.columns))


def name_of(path: Sequence[Any]) -> str:
    """A column's name, for messages and files."""
    return ".".join(map(str, path)) or "output"


def _take(value: Any, samples: int, columns: dict[tuple[Any, ...], Column], path: tuple[Any, ...], said: str) -> Any:
    if value is None:
        return None
    if isinstance(value, list):
        _check_length(len(value), samples, said, f"is a list of {len(value)}")
        columns[path] = [_copied(to_device(entry, "cpu")) for entry in value]
        return None
    if isinstance(value, Tensor | np.ndarray):
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested or value.is_quantized):
            raise ConfigError(
                f"{said} is a sparse, nested or quantized tensor; return a dense one, or a list of tensors"
            )
        if isinstance(value, np.ma.MaskedArray):
            raise ConfigError(
                f"{said} is a masked array, whose mask would be lost; return .filled(), or the mask beside it"
            )
        _check_length(value.shape[0] if value.ndim else None, samples, said, f"has shape {tuple(value.shape)}")
        columns[path] = _copied(value)
        return None
    parts = parts_of(value)
    if parts is None:
        raise ConfigError(
            f"{said} is a {type(value).__name__}; a prediction holds tensors or arrays with a row for each sample, and lists with an "
            "entry for each, in tuples, dictionaries or dataclasses"
        )
    return with_parts(
        value,
        {key: _take(part, samples, columns, (*path, key), step_into(said, value, key)) for key, part in parts.items()},
    )


def _check_length(length: int | None, samples: int, said: str, what: str) -> None:
    if length != samples:
        raise ConfigError(
            f"{said} {what} for a batch of {samples} samples; return tensors whose first dimension is the samples, or a list with an "
            "entry for each sample"
        )


def _copied(value: Any) -> Any:
    """A copy on the CPU that shares no memory: a view would travel with all that it is a view of, and may be overwritten."""
    if isinstance(value, Tensor):
        tensor = value.detach().to("cpu", copy=True)
        return tensor.contiguous() if tensor.layout == torch.strided and not tensor.is_nested else tensor
    if isinstance(value, np.ndarray):
        return value.copy()
    if value is None or isinstance(value, (str, bytes, int, float, complex)):
        return value
    parts = parts_of(value)
    if parts is not None:
        return with_parts(value, {key: _copied(part) for key, part in parts.items()})
    try:
        return pickle.loads(pickle.dumps(value))  # as it travels
    except Exception as error:  # of its class's own
        raise ConfigError(
            f"an output of a sample holds a {type(value).__name__}, which cannot be sent to another rank: {error}"
        ) from error


def _kind(column: Column) -> str:
    if isinstance(column, list):
        return "a list"
    kind = "a tensor" if isinstance(column, Tensor) else "an array"
    return f"{kind} of {str(column.dtype).removeprefix('torch.')} of shape {('samples', *column.shape[1:])}".replace(
        "'", ""
    )


def _filled(shape: Any, columns: Mapping[tuple[Any, ...], Column], path: tuple[Any, ...]) -> Any:
    if path in columns:
        return columns[path]
    parts = parts_of(shape)
    if parts is None:
        return shape
    return with_parts(shape, {key: _filled(part, columns, (*path, key)) for key, part in parts.items()})
