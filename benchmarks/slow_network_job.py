"""One rank of `slow_network.py`: the models, and the ways in turns."""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hvdtrain
from hvdtrain.backends.base import Backend
from hvdtrain.tasks.byte_language_model import CausalTransformer

WAYS: dict[str, dict[str, str]] = {
    "plain": {},
    "compression bf16": {"compression": "bf16"},
    "compression int8": {"compression": "int8"},
    "compression fp8": {"compression": "fp8"},
    "compression 1bit": {"compression": "1bit"},
    "compression topk:0.01": {"compression": "topk:0.01"},
    "compression randomk:0.01": {"compression": "randomk:0.01"},
    "compression powersgd:2": {"compression": "powersgd:2"},
    "sync local-sgd:8": {"sync": "local-sgd:8"},
    "sync local-sgd:20": {"sync": "local-sgd:20"},
    "sync diloco:20": {"sync": "diloco:20"},
    "sync diloco:20, int8": {"sync": "diloco:20", "compression": "int8"},
    "sync diloco:20,delay=15,fragments=2": {"sync": "diloco:20,delay=15,fragments=2"},
    "sync diloco:500": {"sync": "diloco:500"},
    "compression int8, node": {"compression": "int8", "sync_group": "node"},
    "compression powersgd:2, node": {"compression": "powersgd:2", "sync_group": "node"},
    "sync diloco:20, node": {"sync": "diloco:20", "sync_group": "node"},
    "sync local-sgd:8, node": {"sync": "local-sgd:8", "sync_group": "node"},
}
"""Options of `replicate`, by what tables call them."""

LONGEST = 3  # times --steps, for a way that has not reached the loss by then


@dataclass(frozen=True, slots=True)
class Problem:
    """What is learned.

    Attributes:
        model: Makes it, the same on every rank.
        batch: Inputs and targets of a rank's step.
        held_out: Inputs and targets on which it is judged.
        samples: In a rank's batch.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int, int], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    samples: int


def perceptron() -> Problem:
    """A random teacher's answers; 8.5 million parameters, three quarters of a step's time in matrices of 2048 x 2048."""
    width, inputs, classes, rows = 2048, 64, 10, 32
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(inputs, 32, generator=generator), torch.randn(32, classes, generator=generator)

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, classes),
        )  # fmt: skip

    def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed))
        return x, (torch.tanh(x @ first / 4) @ second).argmax(1)

    return Problem(model, lambda rank, step: samples(rows, 1000 * (step + 1) + rank), samples(1000, 2), rows)


def byte_model() -> Problem:
    """The Python standard library's own modules, byte by byte; 7.3 million parameters."""
    context, rows = 32, 2
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.from_numpy(np.concatenate([np.fromfile(file, np.uint8) for file in files]).astype(np.int64))
    train, held = text[: -len(text) // 20], text[-len(text) // 20 :]

    def model() -> nn.Module:
        torch.manual_seed(0)
        return CausalTransformer(context, width=384, layers=4, heads=6, dropout=0.0)

    def windows(of: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
        begin = torch.randint(len(of) - context - 1, (count,), generator=torch.Generator().manual_seed(seed))
        read = of[begin[:, None] + torch.arange(context + 1)]
        return read[:, :-1], read[:, 1:]

    return Problem(model, lambda rank, step: windows(train, rows, 1000 * (step + 1) + rank), windows(held, 96, 2), rows)


PROBLEMS = {"mlp": perceptron, "bytes": byte_model}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and how often the likeliest class is right."""
    scores = model(x)
    right = (scores.argmax(-1) == y).float().mean()
    return nn.functional.cross_entropy(scores.flatten(0, -2), y.flatten()), right


def measure(
    backend: Backend, problem: Problem, args: argparse.Namespace, options: dict[str, str], target: float | None
) -> dict[str, Any]:
    """Train in one way; what it took and how the held-out loss fell, by seconds of training."""
    model = problem.model()
    replica = backend.replicate(model, torch.optim.AdamW(model.parameters(), lr=args.lr), **options)  # type: ignore[arg-type]
    seconds: list[float] = []
    steps_s: list[float] = []
    curve: list[tuple[int, float, float, float]] = []
    first, sent = None, 0.0  # of the first --steps
    watched = "delay" not in options.get("sync", "")
    while True:
        step = len(seconds)
        x, y = problem.batch(backend.rank, step)
        if "sync" not in options:  # else ranks do not wait for each other
            backend.barrier()
        began, before = time.perf_counter(), backend.traffic.sent_bytes
        loss, _ = loss_of(replica.model, x, y)
        replica.backward(loss, samples=problem.samples, total=problem.samples * backend.world_size)
        stepped = time.perf_counter()
        replica.step()
        steps_s.append(time.perf_counter() - stepped)
        seconds.append(time.perf_counter() - began)
        sent += backend.traffic.sent_bytes - before if step < args.steps else 0
        step += 1
        if step != args.steps and (step % args.every or not watched):
            continue
        with replica.shared_weights(), torch.no_grad():
            held, right = (float(one) for one in loss_of(model, *problem.held_out))
        slowest = max(
            backend.all_gather_object(sum(seconds))
        )  # ranks that do not wait for each other are not equally fast
        curve.append((step, round(slowest, 3), round(held, 4), round(right, 4)))
        if step == args.steps:
            first = curve[-1]
        if step >= args.steps and (target is None or not watched or held <= target or step >= LONGEST * args.steps):
            break
    replica.settle()
    assert first is not None
    return {
        "ms_per_step": round(1000 * first[1] / args.steps, 1),
        "median_ms": round(1000 * statistics.median(seconds), 1),
        "sent_bytes_per_step": round(sent / args.steps),
        "loss": first[2],
        "accuracy": first[3],
        "curve": curve,
        "step_s": [round(one, 4) for one in steps_s],
    }


def work(args: argparse.Namespace) -> None:
    """Train in every way, as often as there are turns; rank 0 writes what came of it after each."""
    torch.set_num_threads(1)
    problem = PROBLEMS[args.model]()
    found: dict[str, list[dict[str, Any]]] = {}
    target: float | None = None
    with hvdtrain.init(args.backend) as backend:
        for _ in range(args.turns):
            for way in args.ways:
                one = measure(backend, problem, args, WAYS.get(way, {"sync": way}), target)
                target = one["loss"] if target is None and not args.hides else target
                found.setdefault(way, []).append(one)
                if backend.rank == 0:
                    args.results.write_text(json.dumps(found))
