"""Placeholder while the builder is being written."""

from __future__ import annotations

from importlib.util import find_spec


def why_not() -> str:
    """Why Horovod cannot be used here."""
    return "" if find_spec("horovod") else "Horovod is not installed; type: hvdtrain install-horovod"
