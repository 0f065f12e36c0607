"""Batch normalisation cannot train on one value per channel, which is what a last batch of one sample may come to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hvdtrain.errors import ConfigError

_TORCHS = "more than 1 value per channel"
_OURS = "more than one value per channel over all ranks"


@contextmanager
def lone_samples_explained() -> Iterator[None]:
    """Surround a forward pass.

    Raises:
        ConfigError: Batch normalisation had one value per channel; names the ways out.
    """
    try:
        yield
    except ValueError as error:
        if isinstance(error, ConfigError) or not (_TORCHS in str(error) or _OURS in str(error)):
            raise
        raise ConfigError(
            f"batch normalisation cannot train on one sample with one value per channel ({error}). Join the short last batch of an "
            "epoch with the one before it, or leave it out: last_batch='merge' or 'drop' (--last-batch merge, --last-batch "
            "drop); where every batch is as small, use a larger one, fewer micro-batches, or batch normalisation over all ranks "
            "(--sync-batch-norm)"
        ) from error
