"""What a run says in the end: numbers, and what they were computed with."""

from __future__ import annotations

from typing import Any, cast

import torch

from hvdtrain.backends.base import Backend
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.units import whole
from hvdtrain.backends.watched import without_compile
from hvdtrain.observe.summary import Summary, parameters_norm, parameters_sha256
from hvdtrain.settings.config import TrainConfig
from hvdtrain.training.checkpoint import model_state
from hvdtrain.training.ledger import FitResult
from hvdtrain.version import __version__


def place(backend: Backend) -> dict[str, Any]:
    """Where a run runs, by the names that `Summary` has for it."""
    return {
        "backend": backend.name,
        "engine": backend.engine,
        "launcher": backend.topology.launcher,
        "world_size": backend.world_size,
        "num_nodes": backend.topology.num_nodes,
        "device": str(backend.device),
    }


def summary_of(
    config: TrainConfig, backend: Backend, replica: Replica, result: FitResult, batch: int, wall_seconds: float
) -> Summary:
    """The summary of a run that has ended, the same on every rank; every rank must call it."""
    norm, sha256 = _fingerprint(backend, replica)
    return Summary(
        **place(backend),
        global_batch_size=batch,
        epochs=result.epochs,
        steps=result.steps,
        skipped_steps=result.skipped_steps,
        train_loss=result.train_loss,
        eval_loss=result.eval_metrics.get("loss"),
        eval_accuracy=result.eval_metrics.get("accuracy"),
        eval_metrics=result.eval_metrics,
        samples_per_second=result.samples / result.train_seconds if result.train_seconds else None,
        sent_bytes_per_step=result.sent_bytes_per_step if result.samples else None,
        wall_seconds=wall_seconds,
        seed=config.seed,
        precision=config.precision,
        parameters=sum(p.numel() for p in replica.module.parameters()),
        parameters_norm=norm,
        parameters_sha256=sha256,
        resumed_from=result.resumed_from,
        hvdtrain_version=__version__,
        torch_version=str(torch.__version__),
    )


def _fingerprint(backend: Backend, replica: Replica) -> tuple[float, str]:
    """The norm and the SHA-256 of the whole model; every rank must call it."""
    state = whole(model_state(replica.module, cut=True), root=backend.rank == 0)
    found: tuple[float, str] | None = None
    if backend.rank == 0 or not replica.is_cut:
        names = [without_compile(name) for name, _ in replica.module.named_parameters()]
        found = parameters_norm({name: state[name] for name in names}), parameters_sha256(state)
    return cast(tuple[float, str], backend.broadcast_object(found) if replica.is_cut else found)
