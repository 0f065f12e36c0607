"""Quantities for people."""

from __future__ import annotations


def in_bytes(number: float) -> str:
    """A number of bytes with three digits, in units of 1000."""
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} GB"
