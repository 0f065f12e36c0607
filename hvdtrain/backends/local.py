"""The `local` backend: one process, and the reference that the others are compared with."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hvdtrain.backends.alone import LocalReplica
from hvdtrain.backends.base import Backend
from hvdtrain.backends.group import Group
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.replica_options import ReplicaOptions
from hvdtrain.backends.wire import SelfWire
from hvdtrain.errors import ConfigError
from hvdtrain.launch import algorithms
from hvdtrain.launch.detect import Detection

if TYPE_CHECKING:
    from torch.optim import Optimizer

_log = logging.getLogger(__name__)


class LocalBackend(Backend):
    """One process, no communication.

    Args:
        detection: Must be of a world of one.
        data_parallel: Split each batch over all visible GPUs with `nn.DataParallel`. Without a GPU it changes nothing.
        options: As for `Backend`.
    """

    name = "local"
    shards_models = True

    def __init__(self, detection: Detection, *, data_parallel: bool = False, **options: Any) -> None:
        super().__init__(detection, **options)
        algorithms.refuse("backend local, which is one process,", self.all_reduce_family, ("auto",))
        self._data_parallel = data_parallel
        if data_parallel and self.device.type != "cuda":
            _log.warning("--data-parallel has no GPU to split batches over: the model runs on %s as it is", self.device)

    @classmethod
    def refuses(cls, detection: Detection) -> str:
        """Refuse a world of more than one."""
        topology = detection.topology
        if topology.world_size == 1:
            return ""
        return (
            f"backend 'local' is one process, but {topology.launcher} started {topology.world_size} ranks ({detection.reason}); "
            "use --backend auto, or start with `python -m hvdtrain --backend local`"
        )

    def _connect(self) -> None:
        self._wire = SelfWire(self.device)

    def _replicate(self, model: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions) -> Replica:
        return self._replicate_alone(model, optimizer, options)

    def _replicate_alone(self, model: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions) -> Replica:
        replica = LocalReplica(self, model, optimizer, options)
        if self._data_parallel and torch.cuda.device_count() > 1:
            replica.split_over_gpus()
        return replica

    def _check_exchange(self, asked: str) -> None:
        if self._data_parallel and asked.startswith("sync"):
            raise ConfigError(
                f"{asked} does not go with --data-parallel, which trains one copy of the model; leave one of them out"
            )

    def _group(self, ranks: list[int]) -> Group | None:
        return Group(SelfWire(self.device), label=f"group {ranks}")
