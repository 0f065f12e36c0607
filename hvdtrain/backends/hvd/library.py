"""The Horovod of this environment, loaded once it is known to fit; the other modules take it from here."""

from __future__ import annotations

from hvdtrain.backends.hvd.stamp import why_not
from hvdtrain.errors import BackendUnavailable

_missing = why_not()
if _missing:
    raise BackendUnavailable(_missing)

import horovod  # noqa: E402 - only once it is known to fit
import horovod.torch as hvd  # noqa: E402

__all__ = ["built_with", "hvd", "version"]


def version() -> str:
    """Horovod's own version."""
    return str(horovod.__version__)


def built_with() -> str:
    """What must be the same on every rank: "0.28.1, MPI, no NCCL"."""
    parts = {"MPI": hvd.mpi_built(), "NCCL": hvd.nccl_built()}
    return ", ".join([version(), *(name if there else f"no {name}" for name, there in parts.items())])
