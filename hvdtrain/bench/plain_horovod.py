"""A hand-written script on the real Horovod, with Horovod's own settings: what the engine over Horovod is compared with."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
from torch import nn
from torch.optim import Optimizer


def start() -> tuple[int, int]:
    """Rank and world size."""
    hvd.init()
    return hvd.rank(), hvd.size()


def wrap(model: nn.Module, optimizer: Optimizer) -> Any:
    """The optimizer that exchanges gradients; the model is rank 0's from now on."""
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    return hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())


def stop() -> None:
    """Leave the other ranks."""
    hvd.shutdown()
