"""An exception in words, whatever it is: one whose own words raise, that is 20 MB long, or refers to itself."""

from __future__ import annotations

import traceback

_LONGEST_MESSAGE = 4_000
_LONGEST_TRACEBACK = 60_000


class EndedAsVictim(SystemExit):
    """A rank ends without a word of its own, because another has failed."""


def described(error: BaseException) -> str:
    """One line or a few: the kind of exception and what it says."""
    kind = _kind(error)
    said = _said(error)
    return shortened(f"{kind}: {said}" if said else kind, _LONGEST_MESSAGE)


def traced(error: BaseException) -> str:
    """The traceback, as Python would show it, with what caused it."""
    try:
        return shortened("".join(traceback.format_exception(error)), _LONGEST_TRACEBACK)
    except BaseException as problem:  # out of memory or of stack, or words that raise what they like
        return f"{described(error)}\n(its traceback could not be formatted: {_kind(problem)})\n"


def is_long(error: BaseException) -> bool:
    """Whether `traced` shortens it; one whose words raise is not long."""
    try:
        return sum(map(len, traceback.format_exception(error))) > _LONGEST_TRACEBACK
    except BaseException:
        return False


def shortened(text: str, longest: int) -> str:
    """The beginning and the end of a text that is too long."""
    if len(text) <= longest:
        return text
    head, tail = longest * 2 // 3, longest // 3
    return f"{text[:head]} [... {len(text) - head - tail} characters left out ...] {text[-tail:]}"


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as problem:
        return f"<its message could not be made: {_kind(problem)}>"


def _kind(error: BaseException) -> str:
    return str(type.__getattribute__(type(error), "__name__"))
