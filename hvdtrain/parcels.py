"""What goes to another process by value, and which part of it is at fault when it cannot."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import cloudpickle

from hvdtrain.errors import ConfigError


def packed(parts: Mapping[str, Any], advice: str) -> bytes:
    """Pickle the values of ``parts``, a tuple of them.

    Args:
        parts: By the names that a message calls them.
        advice: What to do about a part that cannot be pickled.

    Raises:
        ConfigError: One cannot; names it, down to the variable or attribute that is the cause.
    """
    try:
        content: bytes = cloudpickle.dumps(tuple(parts.values()))
    except Exception as error:
        path, culprit = _culprit(parts)
        named = " -> ".join(path)
        kind = type(culprit).__name__
        raise ConfigError(
            f"{named}, of type {kind}, cannot be pickled ({error}): {advice}"
        ) from None  # short: for a cell
    return content


def _culprit(parts: Any) -> tuple[list[str], Any]:
    """The innermost part that cannot be pickled by itself, and the way to it."""
    path: list[str] = []
    at, seen = parts, {id(parts)}
    while True:
        found = next(((name, part) for name, part in _parts(at) if id(part) not in seen and not _travels(part)), None)
        if found is None:
            return path or ["this"], at
        path.append(found[0])
        at = found[1]
        seen.add(id(at))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if inspect.ismethod(value):
        yield "self", value.__self__
        value = value.__func__
    if inspect.isfunction(value):
        names = inspect.getclosurevars(value)
        yield from {**names.nonlocals, **names.globals}.items()
        yield from ((f"default {index}", default) for index, default in enumerate(value.__defaults__ or ()))
    elif isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"[{index}]", part) for index, part in enumerate(value))
    else:
        yield from getattr(value, "__dict__", {}).items()


def _travels(value: Any) -> bool:
    try:
        cloudpickle.dumps(value)
    except Exception:
        return False
    return True
