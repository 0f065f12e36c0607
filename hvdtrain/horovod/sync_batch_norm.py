"""Batch normalisation over the whole global batch, as Horovod's `SyncBatchNorm`, on CPUs too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor

from hvdtrain import sync_batch_norm as ours
from hvdtrain.backends.communicator import Communicator
from hvdtrain.horovod import state
from hvdtrain.horovod.operations import allreduce_
from hvdtrain.horovod.reductions import Sum


class _Named:
    """The sum that batch normalisation needs, by Horovod's operations."""

    @property
    def wire(self) -> Any:
        return SimpleNamespace(rank=state.rank(), size=state.size())

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return allreduce_(tensor.clone(), op=Sum)


class SyncBatchNorm(ours.SyncBatchNorm):
    """Batch normalisation with the statistics of all ranks; arguments as of ``torch.nn.BatchNorm2d``.

    Every rank must make the same forward passes in training.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.link = ours.Link(cast(Communicator, _Named()))
