"""The end of a run in a few lines, for people and in ``summary.json``."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from hvdtrain.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a run did; see the issue of each field in ``docs/cli.md``."""

    backend: str
    engine: str
    launcher: str
    world_size: int
    num_nodes: int
    device: str
    global_batch_size: int
    epochs: int
    steps: int
    skipped_steps: int
    train_loss: float
    eval_loss: float | None
    eval_accuracy: float | None
    eval_metrics: dict[str, float]
    samples_per_second: float
    wall_seconds: float
    seed: int
    precision: str
    parameters: int
    parameters_norm: float
    parameters_sha256: str
    resumed_from: str | None
    hvdtrain_version: str
    torch_version: str


def parameters_norm(state: Mapping[str, Tensor]) -> float:
    """The L2 norm over all floating-point tensors of a state_dict, summed in float64."""
    total = sum(float(value.detach().double().square().sum()) for value in state.values() if value.is_floating_point())
    return math.sqrt(total)


def parameters_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over a state_dict: for each name in sorted order the name, dtype, shape, and little-endian bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_summary(summary: Summary, path: Path) -> None:
    """Write ``summary.json``, whole or not at all; NaN and infinities become null.

    Raises:
        CheckpointError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(_clean(asdict(summary)), indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}") from error


def show_summary(summary: Summary, console: Console, run_dir: Path) -> None:
    """Print the run in a few lines."""
    rows = [
        ("backend", f"{summary.backend} ({summary.engine}), world size {summary.world_size}, {summary.device}"),
        (
            "trained",
            f"{summary.epochs} epochs, {summary.steps} steps of {summary.global_batch_size} samples, {summary.precision}",
        ),
        ("train loss", f"{summary.train_loss:.4f}"),
    ]
    rows += [(f"eval {name}", f"{value:.4f}") for name, value in summary.eval_metrics.items()]
    if summary.skipped_steps:
        rows.append(("skipped steps", str(summary.skipped_steps)))
    rows += [
        ("speed", f"{_rate(summary.samples_per_second)}{summary.wall_seconds:.1f} s in all"),
        ("parameters", f"{summary.parameters:,}, sha256 {summary.parameters_sha256[:12]}"),
        ("written to", str(run_dir)),
    ]
    width = max(len(label) for label, _ in rows) + 2
    for label, value in rows:
        console.print(f"{label:<{width}}{value}", highlight=False, markup=False, soft_wrap=True)


def _rate(samples_per_second: float) -> str:
    return "" if math.isnan(samples_per_second) else f"{samples_per_second:,.0f} samples/s; "


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
