"""hvdtrain: one training loop for PyTorch over Horovod, MPI or torch.distributed.

::

    import hvdtrain

    with hvdtrain.init() as backend:
        trainer = hvdtrain.Trainer(backend, model, optimizer, loss=cross_entropy, clip_norm=1.0)
        trainer.fit(train_data, eval_data, epochs=3, global_batch_size=256)

Importing this module imports neither torch nor any engine; the public names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hvdtrain import errors as errors
from hvdtrain.version import __version__

if TYPE_CHECKING:
    from hvdtrain import nn as nn
    from hvdtrain.backends import available as available
    from hvdtrain.backends import create
    from hvdtrain.backends.base import Backend as Backend
    from hvdtrain.backends.communicator import Communicator as Communicator
    from hvdtrain.backends.replica import Replica as Replica
    from hvdtrain.compression.base import Compression as Compression
    from hvdtrain.compression.base import Gather as Gather
    from hvdtrain.compression.base import Sent as Sent
    from hvdtrain.compression.base import Sum as Sum
    from hvdtrain.observe.logger import EvalRecord as EvalRecord
    from hvdtrain.observe.logger import Logger as Logger
    from hvdtrain.observe.logger import StepRecord as StepRecord
    from hvdtrain.observe.progress import ProgressLogger as ProgressLogger
    from hvdtrain.optim.master_weights import MasterWeights as MasterWeights
    from hvdtrain.optim.sharded import ShardedOptimizer as ShardedOptimizer
    from hvdtrain.settings.sync import Sync as Sync
    from hvdtrain.sync_batch_norm import convert_sync_batch_norm as convert_sync_batch_norm
    from hvdtrain.topology import Topology as Topology
    from hvdtrain.training.activation_checkpointing import checkpoint_activations as checkpoint_activations
    from hvdtrain.training.async_checkpoints import AsyncCheckpoints as AsyncCheckpoints
    from hvdtrain.training.callbacks.averaging import ExponentialMovingAverage as ExponentialMovingAverage
    from hvdtrain.training.callbacks.best_checkpoint import BestCheckpoint as BestCheckpoint
    from hvdtrain.training.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from hvdtrain.training.checkpoint import Checkpoints as Checkpoints
    from hvdtrain.training.events import Callback as Callback
    from hvdtrain.training.ledger import FitResult as FitResult
    from hvdtrain.training.loop_state import LoopState as LoopState
    from hvdtrain.training.random_numbers import OwnRandomNumbers as OwnRandomNumbers
    from hvdtrain.training.random_numbers import seed_everything as seed_everything
    from hvdtrain.training.task import Task as Task
    from hvdtrain.training.trainer import Trainer as Trainer
    from hvdtrain.workers import spawn as spawn

    init = create

_PUBLIC = {
    "AsyncCheckpoints": "hvdtrain.training.async_checkpoints:AsyncCheckpoints",
    "Backend": "hvdtrain.backends.base:Backend",
    "BestCheckpoint": "hvdtrain.training.callbacks.best_checkpoint:BestCheckpoint",
    "Callback": "hvdtrain.training.events:Callback",
    "Checkpoints": "hvdtrain.training.checkpoint:Checkpoints",
    "Communicator": "hvdtrain.backends.communicator:Communicator",
    "Compression": "hvdtrain.compression.base:Compression",
    "EarlyStopping": "hvdtrain.training.callbacks.early_stopping:EarlyStopping",
    "EvalRecord": "hvdtrain.observe.logger:EvalRecord",
    "ExponentialMovingAverage": "hvdtrain.training.callbacks.averaging:ExponentialMovingAverage",
    "FitResult": "hvdtrain.training.ledger:FitResult",
    "Logger": "hvdtrain.observe.logger:Logger",
    "Gather": "hvdtrain.compression.base:Gather",
    "LoopState": "hvdtrain.training.loop_state:LoopState",
    "OwnRandomNumbers": "hvdtrain.training.random_numbers:OwnRandomNumbers",
    "ProgressLogger": "hvdtrain.observe.progress:ProgressLogger",
    "Replica": "hvdtrain.backends.replica:Replica",
    "MasterWeights": "hvdtrain.optim.master_weights:MasterWeights",
    "Sent": "hvdtrain.compression.base:Sent",
    "ShardedOptimizer": "hvdtrain.optim.sharded:ShardedOptimizer",
    "StepRecord": "hvdtrain.observe.logger:StepRecord",
    "Sum": "hvdtrain.compression.base:Sum",
    "Sync": "hvdtrain.settings.sync:Sync",
    "Task": "hvdtrain.training.task:Task",
    "Topology": "hvdtrain.topology:Topology",
    "Trainer": "hvdtrain.training.trainer:Trainer",
    "available": "hvdtrain.backends:available",
    "checkpoint_activations": "hvdtrain.training.activation_checkpointing:checkpoint_activations",
    "convert_sync_batch_norm": "hvdtrain.sync_batch_norm:convert_sync_batch_norm",
    "init": "hvdtrain.backends:create",
    "nn": "hvdtrain.nn",
    "seed_everything": "hvdtrain.training.random_numbers:seed_everything",
    "spawn": "hvdtrain.workers:spawn",
}

__all__ = [*sorted(_PUBLIC), "__version__", "errors"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hvdtrain' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value: Any = importlib.import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
