"""What the builder raises."""

from __future__ import annotations

from hvdtrain.errors import HvdtrainError


class BuildError(HvdtrainError):
    """Horovod could not be fetched, edited, built, installed or run here; says what is missing and what brings it."""
