"""Quantities for people."""

from __future__ import annotations


def in_bytes(number: float) -> str:
    """A number of bytes with three digits, in units of 1000."""
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} GB"


def in_duration(seconds: float) -> str:
    """A time, to the second up to two minutes, then to the minute."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
