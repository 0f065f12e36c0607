"""Which engines cut a model over the ranks, and how the others must say that they do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hvdtrain.backends.base import Backend
from hvdtrain.backends.units import torch_can_cut
from hvdtrain.errors import ConfigError

UNITS = "layers[.][^.]+"
REFUSED_BY = {} if torch_can_cut() else dict.fromkeys(("local", "torch", "mpi"), "this torch is too old for it")
REFUSED_BY["horovod"] = (
    "torch's FSDP2 needs a process group of torch.distributed; cut the optimizer's state alone, or take `torch` or `mpi`"
)


def offered(backend: Backend, cut: Callable[[], object]) -> bool:
    """Skip nothing: an engine that cannot must say so in ``cut()``, in a sentence with the way out."""
    if backend.shards_models and torch_can_cut():
        return True
    wrong = (
        "needs a newer torch than"
        if backend.shards_models
        else "does not go with the backend .*--backend torch .* or --backend mpi"
    )
    with pytest.raises(ConfigError, match=wrong):
        cut()
    return False
