"""From what was asked for to a compression."""

from __future__ import annotations

from hvdtrain.compression.base import Compression
from hvdtrain.compression.low_rank import PowerSGD
from hvdtrain.compression.quantized import Float8, Int8, OneBit
from hvdtrain.compression.sparse import RandomK, TopK
from hvdtrain.errors import ConfigError
from hvdtrain.settings.compression import TYPES, parsed


def chosen(asked: str | Compression | None) -> tuple[Compression | None, str | None]:
    """The compression that was asked for, or the type in which gradients are to travel.

    Args:
        asked: As `hvdtrain.settings.compression.parsed` takes it, a compression of your own, or None or "none" for none.

    Returns:
        A compression and None, or None and "fp16" or "bf16", or None twice.

    Raises:
        ConfigError: There is no such thing.
    """
    if asked is None or asked == "none":
        return None, None
    if isinstance(asked, Compression):
        return asked, None
    if not isinstance(asked, str):
        raise ConfigError(
            f"compression= takes a name or a hvdtrain.Compression, got {asked!r:.80} of {type(asked).__name__}"
        )
    name, number = parsed(asked)
    if name in TYPES:
        return None, name
    if name == "powersgd":
        return PowerSGD(int(number)), None
    if name in ("topk", "randomk"):
        return (TopK if name == "topk" else RandomK)(number), None
    return {"int8": Int8, "fp8": Float8, "1bit": OneBit}[name](), None  # type: ignore[abstract]
