"""What messages say of valid names: all of them, or the one that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name most like ``name``, upper and lower case being alike; None when nothing comes close."""
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
