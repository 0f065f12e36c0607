"""How a compression is asked for in text: a name, and for some a number, as in "powersgd:2" or "topk:0.01,after=100", or an import path.

The standard library alone.
"""

from __future__ import annotations

import math

from hvdtrain.errors import ConfigError
from hvdtrain.settings.options import is_import_path
from hvdtrain.settings.wording import did_you_mean, shown

TYPES = ("fp16", "bf16")
"""These are `reduce_dtype`'s: the engine itself sums in that type."""
_WHOLE, _RATIO, _NOTHING = "rank", "ratio", ""
_NUMBER = {
    "int8": _NOTHING,
    "fp8": _NOTHING,
    "1bit": _NOTHING,
    "powersgd": _WHOLE,
    "topk": _RATIO,
    "randomk": _RATIO,
    **dict.fromkeys(TYPES, _NOTHING),
}
FORMS = tuple(name + {_WHOLE: ":RANK", _RATIO: ":RATIO", _NOTHING: ""}[kind] for name, kind in _NUMBER.items())
"""What may be asked for, as messages and the manual show it."""


def parsed(text: str, asked_by: str = "compression") -> tuple[str, float, int]:
    """A compression's name and number, and after how many exchanges it begins.

    The number is 0 where there is none, as of an import path, which is all name.

    Args:
        text: Such as "int8", "powersgd:2" (the rank, 1 or more) or "topk:0.01" (the part that is sent, in (0, 1]), or
            "my.module:Class" (see `hvdtrain.compression.choosing.chosen`), perhaps with ",after=EXCHANGES".
        asked_by: How messages call it.

    Raises:
        ConfigError: There is none of that name, or the number cannot be.
    """
    named, comma, more = text.partition(",")
    name, number = _named(named, asked_by)
    if not comma:
        return name, number, 0
    key, _, after = more.partition("=")
    if key != "after" or not (after.isascii() and after.isdigit() and 1 <= int(after) < 2**31):
        raise ConfigError(
            f"{asked_by} {shown(text)}: after=EXCHANGES may follow, a whole number from 1, as in powersgd:2,after=100"
        )
    if name in TYPES:
        raise ConfigError(
            f"{asked_by} {name} is a type in which gradients are summed, from the first one; leave {shown(more)} out"
        )
    return name, number, int(after)


def _named(text: str, asked_by: str) -> tuple[str, float]:
    name, colon, number = text.partition(":")
    if name not in _NUMBER and is_import_path(text):
        return text, 0
    if name not in _NUMBER:
        raise ConfigError(
            f"{asked_by} must be one of {', '.join(FORMS)} or an import path such as my.module:Class, got {shown(text)}"
            f"{did_you_mean(name, tuple(_NUMBER))}"
        )
    kind = _NUMBER[name]
    if not kind:
        if colon:
            raise ConfigError(f"{asked_by} {name} takes no number, got {shown(text)}; give {name}")
        return name, 0
    try:
        value = float(number) if number.isascii() else math.nan
    except ValueError:
        value = math.nan
    if kind == _WHOLE and not (value >= 1 and value == math.floor(value) and value < 2**31):
        raise ConfigError(f"{asked_by} {name} needs a rank, a whole number from 1, as in {name}:2; got {shown(text)}")
    if kind == _RATIO and not 0 < value <= 1:
        raise ConfigError(
            f"{asked_by} {name} needs the part of the numbers that is sent, more than 0 and at most 1, as in {name}:0.01; got "
            f"{shown(text)}"
        )
    return name, value
