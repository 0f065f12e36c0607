"""Every exception can be put into words."""

from __future__ import annotations

import sys
import time

import pytest

from hvdtrain.ranks.describing import described, is_long, traced


class Silent(Exception):
    def __str__(self):
        raise self

    __repr__ = __str__


class Stubborn(BaseException):
    def __str__(self):
        raise KeyboardInterrupt

    __repr__ = __str__


class Endless(Exception):
    def __str__(self):
        return str(self)


class Odd(Exception):
    def __str__(self):
        return 7  # noqa: PLE0307


def circular():
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    return one


def deep():
    error = ValueError("last")
    for number in range(3 * sys.getrecursionlimit()):
        above = ValueError(str(number))
        above.__cause__ = error
        error = above
    return error


ODD = {
    "its words raise it": (Silent(), "Silent"),
    "its words raise what is no Exception": (Stubborn(), "Stubborn"),
    "its words never end": (Endless(), "Endless"),
    "its words are no text": (Odd(), "Odd"),
    "20 MB": (ValueError("x" * 20_000_000), "ValueError: xxx"),
    "20 MB of bytes": (ValueError(b"\0" * 5_000_000), "ValueError: b'"),
    "a circle": (circular(), "ValueError: one"),
    "a deep chain": (deep(), "ValueError: "),
    "half a character": (ValueError("\ud800"), "ValueError: \ud800"),
    "nothing": (AssertionError(), "AssertionError"),
    "no Exception": (SystemExit(3), "SystemExit: 3"),
    "cannot be pickled": (ValueError(lambda: 0), "ValueError: <function"),
}


@pytest.mark.parametrize(("error", "beginning"), ODD.values(), ids=ODD)
def test_it_is_described_and_shortened(error, beginning):
    began = time.monotonic()
    assert described(error).startswith(beginning)
    assert len(described(error)) < 5_000
    assert beginning.split(":")[0] in traced(error)
    assert len(traced(error)) < 70_000
    assert time.monotonic() - began < 20


def test_what_is_left_out_is_said():
    assert "[... 19996" in described(ValueError("x" * 20_000_000))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no exception groups")
def test_a_group_is_shown_with_its_parts():
    group = ExceptionGroup("several", [ValueError("first"), Silent()])  # noqa: F821
    assert described(group).startswith("ExceptionGroup: several")
    assert "ValueError: first" in traced(group)


@pytest.mark.parametrize(
    ("error", "long"), [(ValueError("short"), False), (ValueError("x" * 70_000), True), (Stubborn(), False)]
)
def test_what_is_shortened_is_known_beforehand(error, long):
    assert is_long(error) == long
    assert ("characters left out" in traced(error)) == long
