"""From what was asked for to a compression."""

from __future__ import annotations

from hvdtrain.compression.base import Compression
from hvdtrain.compression.later import Later
from hvdtrain.compression.low_rank import PowerSGD
from hvdtrain.compression.quantized import Float8, Int8, OneBit
from hvdtrain.compression.sparse import RandomK, TopK
from hvdtrain.errors import ConfigError
from hvdtrain.settings.components import resolve
from hvdtrain.settings.compression import FORMS, TYPES, parsed
from hvdtrain.settings.options import Component, is_import_path

_FLAG = "--compression"
_WITHOUT_ARGUMENTS = f"it is called without any: give one of {', '.join(FORMS)}, or the path of a function of yours that returns a compression"


def chosen(asked: str | Compression | None) -> tuple[Compression | None, str | None]:
    """The compression that was asked for, or the type in which gradients are to travel.

    Args:
        asked: As `hvdtrain.settings.compression.parsed` takes it, a compression of your own, or None or "none" for none. An import
            path names a compression, or what returns one when it is called without arguments: such a class, for one.

    Returns:
        A compression and None, or None and "fp16" or "bf16", or None twice.

    Raises:
        ConfigError: There is no such thing.
    """
    if asked is None or asked == "none":
        return None, None
    if isinstance(asked, Compression):
        return _named(asked, f"compression= of {type(asked).__name__}"), None
    if not isinstance(asked, str):
        raise ConfigError(
            f"compression= takes a name or a hvdtrain.Compression, got {asked!r:.80} of {type(asked).__name__}"
        )
    name, number, after = parsed(asked)
    if name in TYPES:
        return None, name
    made = _made(name, number)
    return (Later(made, after) if after else made), None


def _made(name: str, number: float) -> Compression:
    if is_import_path(name):
        return _imported(name)
    if name == "powersgd":
        return PowerSGD(int(number))
    if name in ("topk", "randomk"):
        return (TopK if name == "topk" else RandomK)(number)
    return {"int8": Int8, "fp8": Float8, "1bit": OneBit}[name]()  # type: ignore[abstract]


def _imported(path: str) -> Compression:
    found = resolve(Component(path), flag=_FLAG, remedy=_WITHOUT_ARGUMENTS)()
    if not isinstance(found, Compression):
        raise ConfigError(
            f"{_FLAG} {path} made {found!r:.80} of {type(found).__name__}, which is no hvdtrain.Compression; name a class that is derived "
            "from it"
        )
    return _named(found, f"{_FLAG} {path}")


def _named(found: Compression, asked_by: str) -> Compression:
    if not isinstance(getattr(found, "name", None), str):
        raise ConfigError(
            f"{asked_by} has no name; give the class one, as checkpoints and messages are to call it: name = "
            f'"{type(found).__name__.lower()}"'
        )
    return found
