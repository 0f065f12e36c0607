"""The end of a run in a few lines, for people and in ``summary.json``."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from hvdtrain.backends.layout import bytes_of
from hvdtrain.observe.quantities import in_bytes
from hvdtrain.observe.whole_file import write_whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a run did; ``docs/cli.md`` says what ``summary.json`` makes of it.

    Attributes:
        backend, engine: What moved the gradients, and over which library: "torch" and "gloo".
        launcher: What started the ranks.
        world_size, num_nodes: Of the job.
        device: Of this rank.
        global_batch_size: Samples per optimizer step over all ranks.
        epochs, steps: Done, those before a resume included.
        skipped_steps: Steps without an update, because the gradient was not finite.
        train_loss: Mean over the last epoch (or part of one) that was trained; NaN if none was.
        eval_loss, eval_accuracy: Of ``eval_metrics``, where they are among them.
        eval_metrics: Of the last evaluation, each a mean over all samples.
        samples_per_second: Over all ranks, in training steps only; None if this run made none.
        sent_bytes_per_step: By this rank in training steps (see `hvdtrain.backends.traffic`); None if this run made none.
        wall_seconds: Of the whole run, this rank's.
        seed, precision: As configured.
        parameters: Number of the model's parameters.
        parameters_norm: See `parameters_norm`.
        parameters_sha256: See `parameters_sha256`, over parameters and buffers.
        resumed_from: The checkpoint that was continued, or None.
        hvdtrain_version, torch_version: What ran.
    """

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
    samples_per_second: float | None
    sent_bytes_per_step: float | None
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
            digest.update(bytes_of(value).numpy().tobytes())
    return digest.hexdigest()


def write_summary(summary: Summary, path: Path) -> None:
    """Write ``summary.json``, whole or not at all; NaN and infinities become null.

    Raises:
        OutputError: It cannot be written.
    """
    write_whole(path, json.dumps(_clean(asdict(summary)), indent=2) + "\n")


def show_summary(summary: Summary, console: Console, run_dir: Path) -> None:
    """Print the run in a few lines."""
    rows = [("backend", f"{summary.backend} ({summary.engine}), world size {summary.world_size}, {summary.device}")]
    if summary.steps:
        done = f"{summary.epochs} epochs, {summary.steps} steps of {summary.global_batch_size} samples"
        rows += [("trained", f"{done}, {summary.precision}"), ("train loss", f"{summary.train_loss:.4f}")]
    else:
        rows.append(("trained", "not at all; evaluated only"))
    rows += [(f"eval {name}", f"{value:.4f}") for name, value in summary.eval_metrics.items()]
    if summary.skipped_steps:
        rows.append(("skipped steps", str(summary.skipped_steps)))
    rows += [
        ("speed", f"{_speed(summary)}{summary.wall_seconds:.1f} s in all"),
        *(
            [("sent", f"{in_bytes(summary.sent_bytes_per_step)} a step by rank 0")]
            if summary.sent_bytes_per_step
            else []
        ),
        ("parameters", f"{summary.parameters:,}, sha256 {summary.parameters_sha256[:12]}"),
        ("written to", str(run_dir)),
    ]
    width = max(len(label) for label, _ in rows) + 2
    for label, value in rows:
        console.print(f"{label:<{width}}{value}", highlight=False, markup=False, soft_wrap=True)


def _speed(summary: Summary) -> str:
    return "" if summary.samples_per_second is None else f"{summary.samples_per_second:,.0f} samples/s; "


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
