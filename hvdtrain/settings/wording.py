"""What messages say: a value as it was given, in so far as it can be shown, and valid names, or the one probably meant."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

_MOST_CHARACTERS = 160
_MOST_ITEMS = 8
_MOST_LEVELS = 4
_MOST_GUESSED = 80  # characters of a name that is compared with the valid ones; difflib's time grows with the square


def shown(value: Any) -> str:
    """``repr(value)``, shortened, also where ``repr`` would fail, or never end.

    A number of more than 4,300 digits has no ``repr``; a few lines of YAML can mean a list of a billion items.
    """
    text = _shown(value, _MOST_LEVELS)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."


def _shown(value: Any, levels: int) -> str:
    if isinstance(value, int) and value.bit_length() > 512:
        return f"a number of {int(value.bit_length() * 0.30103) + 1} digits"
    if isinstance(value, str | bytes) and len(value) > _MOST_CHARACTERS:
        return repr(value[:_MOST_CHARACTERS])
    if type(value) in (list, tuple) or isinstance(value, Mapping):
        opening, closing = "()" if isinstance(value, tuple) else "{}" if isinstance(value, Mapping) else "[]"
        if not levels and value:
            return f"{opening}...{closing}"
        first = list(itertools.islice(value.items() if isinstance(value, Mapping) else value, _MOST_ITEMS))
        if isinstance(value, Mapping):
            parts = [f"{_shown(key, levels - 1)}: {_shown(item, levels - 1)}" for key, item in first]
        else:
            parts = [_shown(item, levels - 1) for item in first]
        rest = ["..."] if len(value) > _MOST_ITEMS else []
        comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
        return f"{opening}{', '.join(parts + rest)}{comma}{closing}"
    try:
        return repr(value)
    except Exception:
        return f"a {type(value).__name__}"


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name most like ``name``, upper and lower case being alike; None when nothing comes close."""
    if len(name) > _MOST_GUESSED:
        return None
    by_lower: dict[str, str] = {}
    for candidate in valid:
        by_lower.setdefault(candidate.lower(), candidate)
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def did_you_mean(name: Any, valid: Iterable[str]) -> str:
    """``"; did you mean 'mnist'?"``, or nothing when no valid name comes close."""
    guess = nearest(str(name), valid)
    return f"; did you mean {guess!r}?" if guess else ""


def one_of(choices: Iterable[str]) -> str:
    """``"one of fp32, fp64"``."""
    return f"one of {', '.join(choices)}"
