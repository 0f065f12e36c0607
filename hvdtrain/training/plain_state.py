"""A state as plain values, and back as it was: what is saved is never pickled, so that nothing need be unpickled.

Plain are None, numbers, text, tensors, lists, and dictionaries with text as keys. Everything else that can be saved becomes
a dictionary that names its type: tuples, sets, Counters, dictionaries with other keys, NumPy's numbers and arrays, and so
on, exactly of these types (a subclass is more than its content); of members of an enumeration, namedtuples and dataclasses
the content is saved, and the class is that of the running object's.

What belongs to the program and not to its state is not saved but *kept*: functions, classes, and objects that the caller
names, such as the optimizer of a schedule. Coming back, they are taken from the same place of the state that the running
object has now. An object inside a state that has `state_dict` and `load_state_dict` of its own is saved by the first and
continued by the second. Anything else is refused, by name.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdtrain.errors import CheckpointError

_TYPE = "__type__"
_KEPT = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, type, np.ufunc)
_SEQUENCES: dict[str, type] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "Size": torch.Size,
    "deque": deque,
}
_MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter, "defaultdict": defaultdict}
_FACTORIES: dict[str, type] = {kind.__name__: kind for kind in (int, float, list, dict, set, tuple, str, bool)}
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A type of values without values in them: which they are, their content as plain values, and a value from that."""

    fits: Callable[[Any], bool]
    content: Callable[[Any], dict[str, Any]]
    value: Callable[[dict[str, Any]], Any]


def _numpy_content(value: Any) -> dict[str, Any]:
    array = np.asarray(value)
    return {"dtype": array.dtype.str, "shape": list(array.shape), "hex": array.tobytes().hex()}


def _array(content: dict[str, Any]) -> Any:
    return np.frombuffer(bytes.fromhex(content["hex"]), np.dtype(content["dtype"])).reshape(content["shape"]).copy()


def _is_number(value: Any) -> bool:
    return isinstance(value, np.generic) and value.dtype.kind in "biufcSU"


def _is_array(value: Any) -> bool:
    return type(value) is np.ndarray and value.dtype.kind in "biufcSU"


def _dtype(content: dict[str, Any]) -> torch.dtype:
    return {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}[content["name"]]


def _generator(content: dict[str, Any]) -> torch.Generator:
    generator = torch.Generator(content["device"])
    generator.set_state(content["state"])
    return generator


_LEAVES = {
    "bytes": _Leaf(lambda x: type(x) is bytes, lambda x: {"hex": x.hex()}, lambda c: bytes.fromhex(c["hex"])),
    "bytearray": _Leaf(
        lambda x: type(x) is bytearray, lambda x: {"hex": x.hex()}, lambda c: bytearray.fromhex(c["hex"])
    ),
    "complex": _Leaf(
        lambda x: type(x) is complex, lambda x: {"parts": [x.real, x.imag]}, lambda c: complex(*c["parts"])
    ),
    "range": _Leaf(
        lambda x: type(x) is range, lambda x: {"bounds": [x.start, x.stop, x.step]}, lambda c: range(*c["bounds"])
    ),
    "dtype": _Leaf(lambda x: type(x) is torch.dtype, lambda x: {"name": str(x)}, _dtype),
    "device": _Leaf(lambda x: type(x) is torch.device, lambda x: {"name": str(x)}, lambda c: torch.device(c["name"])),
    "Generator": _Leaf(
        lambda x: type(x) is torch.Generator,
        lambda x: {"device": str(x.device), "state": x.get_state()},
        _generator,
    ),
    "numpy": _Leaf(_is_number, _numpy_content, lambda c: _array(c)[()]),
    "ndarray": _Leaf(_is_array, _numpy_content, _array),
}


def to_plain(value: Any, where: str, *, kept: Sequence[object] = ()) -> Any:
    """Return a state as plain values; tensors are shared with it, not copied.

    Args:
        value: The state.
        where: How messages name it, such as "the schedule".
        kept: Objects that are part of the program, if the state refers to them.

    Raises:
        CheckpointError: Something in it can be neither saved nor kept; the message says where and what.
    """
    return _Saving(kept).plain(value, where)


def from_plain(value: Any, own: Any, where: str) -> Any:
    """Return the state that `to_plain` was given.

    Args:
        value: What `to_plain` returned.
        own: The same object's state as it is now, where what was kept is found; None if nothing was.
        where: How messages name it.

    Raises:
        CheckpointError: What was kept is not there, or the state is of an unknown type.
    """
    if isinstance(value, list):
        return [from_plain(item, _item(own, index), f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict) and _TYPE in value:
        return _tagged(value, own, where)
    if isinstance(value, dict):
        return {key: from_plain(item, _item(own, key), f"{where}[{key!r}]") for key, item in value.items()}
    return value


def is_stateful(value: object) -> bool:
    """Whether an object's state can be saved and continued."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


class _Saving:
    """One walk over a state."""

    def __init__(self, kept: Sequence[object]) -> None:
        self._kept = {id(item) for item in kept}
        self._path: list[int] = []  # the containers around the value, to find one that contains itself

    def plain(self, value: Any, where: str) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            return value.detach()
        if id(value) in self._path:
            raise CheckpointError(f"{where} cannot be saved: it refers to itself")
        self._path.append(id(value))
        try:
            return self._container(value, where)
        finally:
            self._path.pop()

    def _container(self, value: Any, where: str) -> Any:
        kind = type(value)
        if kind is list:
            return self._items(value, where)
        if kind in _SEQUENCES.values():
            more = {"maxlen": value.maxlen} if kind is deque else {}
            return {_TYPE: kind.__name__, "items": self._items(value, where), **more}
        if kind in _MAPPINGS.values():
            return self._mapping(value, where)
        for name, leaf in _LEAVES.items():
            if leaf.fits(value):
                return {_TYPE: name, **leaf.content(value)}
        if id(value) in self._kept or isinstance(value, _KEPT):
            return {_TYPE: "kept", "name": getattr(value, "__qualname__", kind.__qualname__)}
        return {"class": kind.__qualname__, **self._content(value, where)}

    def _content(self, value: Any, where: str) -> dict[str, Any]:
        """What is saved of an object whose class is the running object's."""
        if isinstance(value, Enum):
            return {_TYPE: "enum", "name": value.name}
        if isinstance(value, tuple) and hasattr(value, "_make"):
            return {_TYPE: "namedtuple", "items": self._items(value, where)}
        if is_stateful(value):
            return {_TYPE: "object", "state": self.plain(value.state_dict(), where)}
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
            return {_TYPE: "dataclass", "fields": {n: self.plain(getattr(value, n), f"{where}.{n}") for n in names}}
        kind = type(value)
        raise CheckpointError(
            f"{where} cannot be saved: it is a {kind.__module__}.{kind.__qualname__}. Keep numbers, text, tensors, lists, "
            "tuples and dictionaries there, or give that class state_dict and load_state_dict"
        )

    def _items(self, items: Any, where: str) -> list[Any]:
        return [self.plain(item, f"{where}[{index}]") for index, item in enumerate(items)]

    def _mapping(self, value: Any, where: str) -> dict[str, Any]:
        kind = type(value)
        if kind is dict and all(type(key) is str for key in value) and _TYPE not in value:
            return {key: self.plain(item, f"{where}[{key!r}]") for key, item in value.items()}
        pairs = [
            [self.plain(key, f"{where}, a key"), self.plain(item, f"{where}[{key!r}]")] for key, item in value.items()
        ]
        factory = value.default_factory if kind is defaultdict else None
        if factory is None:
            return {_TYPE: kind.__name__, "items": pairs}
        if factory not in _FACTORIES.values():
            raise CheckpointError(
                f"{where} cannot be saved: it makes its values by {factory!r}; use a plain dictionary"
            )
        return {_TYPE: kind.__name__, "items": pairs, "factory": factory.__name__}


def _tagged(value: dict[str, Any], own: Any, where: str) -> Any:
    kind = value[_TYPE]
    if kind == "kept":
        if own is _ABSENT or own is None:
            raise CheckpointError(
                f"{where} was {value['name']} when the state was saved, which is not saved but taken from the running program, "
                "and it has nothing there: build the object as it was built then"
            )
        return own
    if "class" in value:
        return _of_own_class(value, own, where)
    if kind in _SEQUENCES:
        items = from_plain(value["items"], own, where)
        return deque(items, value["maxlen"]) if kind == "deque" else _SEQUENCES[kind](items)
    if kind in _MAPPINGS:
        return _mapping_again(value, own, where)
    if kind not in _LEAVES:
        raise CheckpointError(f"{where} was saved as a {kind!r}, which this version does not know")
    return _LEAVES[kind].value(value)


def _of_own_class(value: dict[str, Any], own: Any, where: str) -> Any:
    if type(own).__qualname__ != value["class"]:
        has = "nothing" if own is _ABSENT else f"a {type(own).__qualname__}"
        raise CheckpointError(f"{where} was a {value['class']} when the state was saved, and is {has} now")
    if value[_TYPE] == "enum":
        return type(own)[value["name"]]
    if value[_TYPE] == "namedtuple":
        return own._make(from_plain(value["items"], own, where))
    if value[_TYPE] == "object":
        own.load_state_dict(from_plain(value["state"], own.state_dict(), where))
        return own
    clone = copy.copy(own)
    for name, item in value["fields"].items():
        object.__setattr__(clone, name, from_plain(item, getattr(own, name, _ABSENT), f"{where}.{name}"))
    return clone


def _mapping_again(value: dict[str, Any], own: Any, where: str) -> Any:
    content: dict[Any, Any] = {}
    for plain_key, item in value["items"]:
        key = from_plain(plain_key, None, where)
        content[key] = from_plain(item, _item(own, key), f"{where}[{key!r}]")
    if value[_TYPE] == "defaultdict":
        return defaultdict(_FACTORIES.get(value.get("factory", "")), content)
    return _MAPPINGS[value[_TYPE]](content)


def _item(own: Any, key: Any) -> Any:
    """The value at the same place of the running object's own state."""
    if isinstance(own, Mapping):
        return own.get(key, _ABSENT)
    if isinstance(own, (list, tuple, deque)) and isinstance(key, int) and key < len(own):
        return own[key]
    return _ABSENT
