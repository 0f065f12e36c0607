"""Models that cannot take what a last batch may come to: one sample for batch normalisation, or none at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hvdtrain.errors import ConfigError, HvdtrainError

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


@contextmanager
def batches_without_samples_explained(samples: int) -> Iterator[None]:
    """Surround what is computed of a batch, which may have no samples: a rank without any keeps in step with the others.

    Raises:
        ConfigError: It has none, and the model, the loss or the metrics do not take that; names the ways out.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        if samples or isinstance(error, HvdtrainError):  # which says itself what is wrong, the same on every rank
            raise
        raise ConfigError(
            "this rank has no sample of a batch, and runs the model on none to keep in step with the others, which the model or the task "
            f"does not take ({type(error).__name__}: {error}). Join an epoch's short last batch with the one before it, or leave it "
            "out: last_batch='merge' or 'drop' (--last-batch merge, --last-batch drop); otherwise give each rank samples in every "
            "batch, or let the model take a batch of length 0 (x.flatten(1) does, x.view(len(x), -1) does not)"
        ) from error
