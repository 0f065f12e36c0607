"""What a rank notes of a run, small enough to be kept whatever the size of the model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdtrain.data.nested import leaves

_MOST_NUMBERS = 10_000  # of one tensor: evenly spaced ones stand for the others


@dataclass(kw_only=True, slots=True)
class Call:
    """One call of the task's loss.

    Attributes:
        samples: A digest of each sample; None where the batch cannot be cut into samples.
        loss: What it returned.
        changed: Expressions of the parts of the batch that it has changed in place where the data set may have them too.
        random: A digest of the state of this process's random numbers afterwards.
        weight: What the loss is a mean over: samples, or what the task says; None where that is not known.
        shapes: Of a sample's parts: those of a padded batch depend on the samples that are together in it.
        data_drew: Random numbers were drawn between the call before and this one: by the data set.
        loss_drew: The loss drew some, or the model.
    """

    samples: list[str] | None
    loss: float
    changed: list[str]
    random: str
    weight: float | None = None
    shapes: str = ""
    data_drew: bool = False
    loss_drew: bool = False


@dataclass(kw_only=True, slots=True)
class Step:
    """One optimizer step: its calls, and some numbers of each gradient (exchanged), buffer and parameter (after it)."""

    calls: list[Call] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Notes:
    """One rank's notes.

    Attributes:
        rank: Which.
        world_size: Of how many.
        initial: Some numbers of each parameter and buffer, as the task made them.
        norms: Names of layers that take statistics over the samples of one rank.
        dropouts: Names of layers that leave something out at random, and were told not to.
        summed: The task's loss is a sum over the samples (``loss_reduction = "sum"``).
        steps: In order.
    """

    rank: int
    world_size: int
    initial: dict[str, Tensor] = field(default_factory=dict)
    norms: list[str] = field(default_factory=list)
    dropouts: list[str] = field(default_factory=list)
    summed: bool = False
    steps: list[Step] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write them for `read`."""
        torch.save(asdict(self), folder / f"rank-{self.rank}.pt")


def read(folder: Path) -> list[Notes]:
    """The notes of all ranks that wrote some, in order."""
    found = [torch.load(file, weights_only=True) for file in folder.glob("rank-*.pt")]
    notes = [
        Notes(
            **{**each, "steps": [Step(**{**s, "calls": [Call(**call) for call in s["calls"]]}) for s in each["steps"]]}
        )
        for each in found
    ]
    return sorted(notes, key=lambda one: one.rank)


def numbers(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Evenly spaced numbers of each tensor, on the CPU; float64, whatever they were."""
    found = {}
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        if flat.is_complex():
            flat = torch.view_as_real(flat).reshape(-1)
        step = max(1, flat.numel() // _MOST_NUMBERS)
        found[name] = flat[::step].to("cpu", torch.float64, copy=True)
    return found


def sample_digests(batch: Any) -> list[str] | None:
    """A digest of each sample of a batch; None if its parts have no common length."""
    found = [leaf for _, leaf in leaves(batch) if leaf is not None]
    lengths = {_length(leaf) for leaf in found}
    if len(lengths) != 1 or None in lengths:
        return None
    return [_digest(leaf[index] for leaf in found) for index in range(lengths.pop() or 0)]


def part_digests(batch: Any) -> dict[str, str]:
    """A digest of each part of a batch, by the expression that leads to it."""
    return {path: _digest([leaf]) for path, leaf in leaves(batch)}


def sample_shapes(batch: Any) -> str:
    """The shapes of one sample's parts, as far as they have some."""
    return repr([tuple(leaf.shape[1:]) for _, leaf in leaves(batch) if isinstance(leaf, Tensor | np.ndarray)])


def random_digest() -> str:
    """Of the state of this process's random numbers on the CPU."""
    return _digest([torch.get_rng_state()])


def all_random_digest() -> str:
    """Of torch's numbers, NumPy's and those of `random`."""
    return _digest([torch.get_rng_state(), np.random.get_state(), random.getstate()])


def _length(leaf: Any) -> int | None:
    if isinstance(leaf, Tensor | np.ndarray):
        return len(leaf) if leaf.ndim else None
    return None


def _digest(parts: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            dense = part.detach().to_dense().cpu().contiguous()
            found.update(f"{dense.dtype}{tuple(dense.shape)}".encode())
            found.update(dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b"")
        elif isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        else:
            found.update(repr(part).encode())
    return found.hexdigest()[:16]
