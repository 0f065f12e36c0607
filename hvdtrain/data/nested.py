"""The one walk over a nested batch: whoever moves, casts, measures or empties a batch finds the same things in it.

A batch is a tree. Its inner nodes are tuples (named ones too), lists and other mutable sequences, mappings, dataclasses,
and objects that say themselves how they move (``.to``); everything else is a leaf. A changed node is a copy of the same
type with the same other attributes: no constructor and no ``__post_init__`` runs again, and the argument stays as it is.

Which part of a batch belongs to a sample cannot be seen in one batch: a list of two may be two fields or two samples.
`empty_from` therefore compares two batches of different length.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from array import array
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from numbers import Integral, Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hvdtrain.errors import ConfigError

_Parts = dict[Any, Any]  # by index, key or attribute's name

SHORTER, LONGER = 2, 3
"""How many samples the two batches have that `empty_from` compares; not 1, where collate functions like to squeeze."""


def to_device(batch: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    """Return a batch with its tensors on a device.

    Args:
        batch: A tree as above. An object with ``.to`` is moved by it. Any other leaf stays as it is.
        device: Where to.
        non_blocking: Return before copies from pinned memory are done.
    """

    def moved(value: Any, above: tuple[int, ...]) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=non_blocking)
        kind = type(value)  # the usual containers first: this runs at every step
        if kind is tuple or kind is list:
            return kind(moved(part, above) for part in value)
        if kind is dict:
            return {key: moved(part, above) for key, part in value.items()}
        if _moves_itself(value):
            said = {"non_blocking": True} if non_blocking and _takes_non_blocking(value.to) else {}
            result = value.to(device, **said)
            return value if result is None else result  # some move in place, as modules do
        return _changed(value, moved, above)

    return moved(batch, ())


def cast_floating(batch: Any, dtype: torch.dtype) -> Any:
    """Return a batch whose floating-point tensors are of ``dtype``; integers, complex numbers and arrays stay."""

    def cast(value: Any, above: tuple[int, ...]) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        return _changed(value, cast, above)

    return cast(batch, ())


def laid_out(batch: Any, memory_format: torch.memory_format) -> Any:
    """Return a batch whose 4-D tensors lie in a memory format; the others stay."""

    def lie(value: Any, above: tuple[int, ...]) -> Any:
        if isinstance(value, Tensor):
            return value.contiguous(memory_format=memory_format) if value.dim() == 4 else value
        return _changed(value, lie, above)

    return lie(batch, ())


def leaves(batch: Any, path: str = "batch", *, _above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield each leaf with the expression that leads to it, such as ``batch['image'][0]``."""
    parts = None if id(batch) in _above else parts_of(batch)
    if parts is None:
        yield path, batch
        return
    for key, value in parts.items():
        yield from leaves(value, step_into(path, batch, key), _above=(*_above, id(batch)))


def memory_bytes(batch: Any) -> int:
    """Return how many bytes the leaves of a batch take, counting 8 for what is no tensor, array or text."""
    return sum(_leaf_bytes(leaf) for _, leaf in leaves(batch))


def parts_of(value: Any) -> _Parts | None:
    """Return what a node holds, by index, key or attribute; None for a leaf."""
    if value is None or isinstance(value, str | bytes | Tensor | torch.Size | nn.Module | type):
        return None
    if _is_sequence(value):
        return dict(enumerate(value))
    if isinstance(value, Mapping):
        return dict(value.items())
    if dataclasses.is_dataclass(value) or _moves_itself(value):
        return _attributes(value) or None
    return None


def with_parts(value: Any, parts: _Parts) -> Any:
    """Return a copy of a node that holds other parts; a sequence or mapping may become shorter."""
    if isinstance(value, tuple):
        return _tuple_with(value, parts)
    if _is_sequence(value):
        clone = copy.copy(value)
        clone.clear()
        clone.extend(parts.values())
        return clone
    if isinstance(value, MutableMapping):
        clone = copy.copy(value)
        for key in [key for key in clone if key not in parts]:
            del clone[key]
        for key, part in parts.items():
            clone[key] = part
        return clone
    if isinstance(value, Mapping):
        return type(value)(parts)  # type: ignore[call-arg]
    clone = copy.copy(value)  # and not dataclasses.replace, which would run __post_init__ again
    own = getattr(clone, "__dict__", {})
    for name, part in parts.items():
        if name in own:
            own[name] = part
        else:
            object.__setattr__(clone, name, part)
    return clone


def step_into(path: str, node: Any, key: Any) -> str:
    """Return the expression for a part of the node that ``path`` leads to."""
    if isinstance(node, Mapping) or isinstance(key, int):
        return f"{path}[{key!r}]"
    return f"{path}.{key}"


def empty_from(shorter: Any, longer: Any) -> Any:
    """Return the batch of length 0 that goes on where two batches of one data set lead.

    What is equally long in both stays as it is (a mask for all samples, a number, a text). What grows with the samples
    is cut to what it has without any: along whichever dimension that is, lists of text or of dictionaries too, and
    whole numbers that count samples or tokens become 0.

    Args:
        shorter: A batch of `SHORTER` samples.
        longer: A batch of `LONGER` samples, otherwise alike; the same sample again and again is best.

    Raises:
        ConfigError: Some part, or the whole, does not show what an empty one would be.
    """
    emptier = _Emptier()
    empty = emptier.empty(shorter, longer, "batch")
    if not emptier.found:
        raise ConfigError(
            f"a batch of this data (a {type(shorter).__name__}) has no part that grows with its samples, so that none can be "
            f"made for the ranks without a sample. {_REMEDY}"
        )
    return empty


_REMEDY = (
    "Let collate= return tensors, lists, dictionaries, tuples or dataclasses of these; or give the batch's class __len__ and a "
    "__getitem__ that takes a slice; or see to it that every rank has a sample in every batch (last_batch='drop' or "
    "'merge', a larger batch)"
)


class _Emptier:
    """Walks through two batches at a time; ``found`` says whether anything grew."""

    def __init__(self) -> None:
        self.found = False
        self._above: list[int] = []  # objects that lead to themselves

    def empty(self, a: Any, b: Any, path: str) -> Any:
        if a is b or id(a) in self._above:
            return a
        if type(a) is not type(b):
            raise self._unclear(a, path, f"and in a longer batch a {type(b).__name__}")
        if isinstance(a, Tensor | np.ndarray):
            return self._array(a, b, path)
        if a is None or isinstance(a, str | bytes | Number | np.generic):
            return type(a)(0) if isinstance(a, Integral) and _counts(a, b) else a  # type: ignore[call-arg]
        if isinstance(a, PackedSequence):
            return self._packed(a)
        self._above.append(id(a))
        try:
            return self._node(a, b, path) if _is_sequence(a) or isinstance(a, dict) else self._object(a, b, path)
        finally:
            self._above.pop()

    def _object(self, a: Any, b: Any, path: str) -> Any:
        if _equal(a, b):
            return a
        sliced = _sliced(a)
        if sliced is None:
            return self._node(a, b, path)
        self.found = True
        return sliced

    def _node(self, a: Any, b: Any, path: str) -> Any:
        parts, longer = parts_of(a), parts_of(b)
        if parts is None or longer is None:  # of no use to whoever moves, but both can be looked into
            parts, longer = _attributes(a), _attributes(b)
            if not parts:
                raise self._unclear(a, path, "which does not show what belongs to a sample")
        if len(parts) != len(longer):
            keep = _without_samples(len(parts), len(longer))
            if keep is None or (keep and not _is_sequence(a)):
                raise self._unclear(a, path, f"with {len(parts)} parts, and with {len(longer)} in a longer batch")
            self.found = True
            parts = dict(list(parts.items())[:keep])
        elif list(parts) != list(longer):
            raise self._unclear(a, path, "whose parts have other names in a longer batch")
        empty = {key: self.empty(part, longer[key], step_into(path, a, key)) for key, part in parts.items()}
        return with_parts(a, empty)

    def _array(self, a: Any, b: Any, path: str) -> Any:
        if isinstance(a, Tensor) and a.is_nested:
            raise self._unclear(a, path, "that is nested, and torch has no empty one of that kind")
        if a.ndim != b.ndim:
            raise self._unclear(a, path, f"with {a.ndim} dimensions, and with {b.ndim} in a longer batch")
        if a.ndim == 0:
            if not (_is_whole(a) and _counts(a, b)):
                return a
            return torch.zeros_like(a) if isinstance(a, Tensor) else np.zeros_like(a)
        for dim, (size, longer) in enumerate(zip(a.shape, b.shape, strict=True)):
            keep = _without_samples(size, longer)
            if keep is not None and size != longer:
                self.found = True
                a = _first(a, dim, keep)
        return a

    def _packed(self, a: PackedSequence) -> PackedSequence:
        self.found = True
        sort, unsort = a.sorted_indices, a.unsorted_indices
        return PackedSequence(
            a.data[:0],
            torch.zeros_like(a.batch_sizes),  # as many steps, and no sequence in them: an RNN takes that
            None if sort is None else sort[:0],
            None if unsort is None else unsort[:0],
        )

    def _unclear(self, value: Any, path: str, why: str) -> ConfigError:
        return ConfigError(
            f"no empty batch can be made for ranks without a sample: {path} is a {type(value).__name__}, {why}. {_REMEDY}"
        )


def _is_sequence(value: Any) -> bool:
    """Whether it is a row of anything; text, bytes and arrays of numbers are none."""
    if isinstance(value, tuple | list):
        return not isinstance(value, torch.Size)
    return isinstance(value, MutableSequence) and not isinstance(value, bytearray | array)


def _without_samples(shorter: int, longer: int) -> int | None:
    """A length without samples, from those with `SHORTER` and `LONGER`; None where it shrinks with more."""
    return None if longer < shorter else max(0, shorter - SHORTER * (longer - shorter) // (LONGER - SHORTER))


def _counts(a: Any, b: Any) -> bool:
    """Whether a whole number counts something that every sample has as much of: samples, tokens."""
    return int(a) != 0 and int(a) * LONGER == int(b) * SHORTER


def _is_whole(a: Any) -> bool:
    if isinstance(a, Tensor):
        return not (a.is_floating_point() or a.is_complex() or a.dtype == torch.bool)
    return a.dtype.kind in "iu"


def _first(array: Any, dim: int, length: int) -> Any:
    """The first entries along a dimension, also of a sparse tensor."""
    if not isinstance(array, Tensor):
        return array[(slice(None),) * dim + (slice(length),)]
    if array.layout == torch.strided:
        return array.narrow(dim, 0, length)
    chosen = torch.arange(length, device=array.device)
    cut = (array if array.layout == torch.sparse_coo else array.to_sparse_coo()).index_select(dim, chosen)
    return cut if array.layout == torch.sparse_coo else cut.to_sparse(layout=array.layout)


def _sliced(value: Any) -> Any:
    """An object's own idea of no samples; None where it has none."""
    kind = type(value)
    if not (hasattr(kind, "__getitem__") and hasattr(kind, "__len__")) or hasattr(kind, "__missing__"):
        return None
    try:
        sliced = value[0:0]
        return sliced if type(sliced) is kind and len(sliced) == 0 else None
    except Exception:  # it takes keys, or one index
        return None


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # arrays inside
        return False


def _changed(value: Any, change: Callable[[Any, tuple[int, ...]], Any], above: tuple[int, ...]) -> Any:
    """A node whose parts have been through ``change``; the node itself if that left them as they are.

    ``above`` are the nodes on the way here: an object may lead back to itself.
    """
    parts = None if id(value) in above else parts_of(value)
    if parts is None:
        return value
    changed = {key: change(part, (*above, id(value))) for key, part in parts.items()}
    if all(changed[key] is part for key, part in parts.items()):
        return value
    return with_parts(value, changed)


def _attributes(value: Any) -> _Parts:
    """An object's own attributes, from its dictionary and its slots."""
    found: _Parts = dict(getattr(value, "__dict__", None) or {})
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            mangled = (
                f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name
            )
            if name not in ("__dict__", "__weakref__") and hasattr(value, mangled):
                found[mangled] = getattr(value, mangled)
    return found


def _tuple_with(value: Any, parts: _Parts) -> Any:
    kind: Any = type(value)
    if hasattr(kind, "n_sequence_fields"):  # what torch.max returns: tuple.__new__ refuses these
        return kind(parts.values())
    clone = tuple.__new__(kind, parts.values())  # and not kind(...), which may take other arguments
    if hasattr(value, "__dict__"):
        vars(clone).update(vars(value))
    return clone


def _moves_itself(value: Any) -> bool:
    try:
        return not isinstance(value, type) and callable(getattr(value, "to", None))
    except KeyError:  # a dictionary that shows its keys as attributes
        return False


def _takes_non_blocking(to: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(to).parameters
    except (TypeError, ValueError):  # a builtin that does not tell
        return False
    keywords = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return keywords or "non_blocking" in parameters


def _stored(tensor: Tensor) -> tuple[Tensor, ...]:
    """What a tensor keeps: of a sparse one, where its values stand and the values."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def _leaf_bytes(leaf: Any) -> int:
    if isinstance(leaf, Tensor):
        return sum(part.numel() * part.element_size() for part in _stored(leaf))
    if isinstance(leaf, str | bytes | bytearray):
        return len(leaf)
    return int(getattr(leaf, "nbytes", 8))
