"""How tensors are combined, under Horovod's names and with Horovod's numbers."""

from __future__ import annotations

import warnings

Average, Sum, Adasum, Min, Max, Product = range(6)

NAMES = ("Average", "Sum", "Adasum", "Min", "Max", "Product")


def chosen(op: int | None, average: bool | None) -> int:
    """What ``op=`` and the older ``average=`` come to.

    Raises:
        ValueError: Both were given, or ``op`` is none of Horovod's.
    """
    if op is not None:
        if average is not None:
            raise ValueError("op= takes the place of average=; give one of them")
        return valid(op)
    if average is None:
        return Average
    warnings.warn("average= is deprecated; use op=hvd.Average or op=hvd.Sum", DeprecationWarning, stacklevel=3)
    return Average if average else Sum


def valid(op: int) -> int:
    """``op`` itself.

    Raises:
        ValueError: It is none of Horovod's.
    """
    if op not in range(len(NAMES)):
        raise ValueError(f"unknown reduction op={op!r}; use hvd.{', hvd.'.join(NAMES)}")
    return op
