"""What the Trainer costs: its steps against those of a loop written by hand for the same engine, side by side in one run.

torchrun --nproc-per-node 2 benchmarks/overhead.py
torchrun --nproc-per-node 2 benchmarks/overhead.py --steps 200 --rounds 5
horovodrun -np 2 python benchmarks/overhead.py --backend horovod

By hand means DistributedDataParallel, or horovod.torch.DistributedOptimizer. Both sides do the same work on the same
model: fetch a batch, forward, cross-entropy, backward, all-reduce, clip, momentum SGD, read the loss. They take turns in
rounds of steps within one process, so Horovod has its own default settings for both, and not ours; `hvdtrain bench step`
compares those. The figure is the ratio of the medians over all steps. The last line of the output is one JSON object.

The last row is what streams cost besides: before each step all ranks learn how many samples it has. Steps on batches that
are there, with and without that, take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.data.loader import make_loader
from hvdtrain.data.partition import BatchPartition
from hvdtrain.data.samplers import PartitionSampler

BATCH = 16  # per rank
HOROVODS_OWN = {"fusion_threshold_mb": 128, "process_sets": False}
Step = Callable[[torch.Tensor, torch.Tensor], None]


def mlp(width: int, depth: int) -> nn.Module:
    return nn.Sequential(
        *[layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())], nn.Linear(width, 10)
    )


def with_ddp(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        loss = cross_entropy(ddp(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def with_horovod(model: nn.Module, optimizer: Any) -> Step:
    import horovod.torch as hvd  # noqa: PLC0415  (one engine of several)

    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


by_hand: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Step]] = {"torch": with_ddp, "horovod": with_horovod}


def hand_written(
    backend: hvdtrain.Backend, model: nn.Module, data: ArrayDataset, times: list[float], steps: int
) -> None:
    loop = by_hand[backend.name](model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    partition = BatchPartition(
        length=len(data), global_batch_size=BATCH * backend.world_size, world_size=backend.world_size, rank=backend.rank
    )
    loader = make_loader(data, PartitionSampler(partition, shuffle=True, seed=0))
    model.train()
    done = 0
    while done < steps:
        batches = iter(loader)
        for _ in range(min(len(loader), steps - done)):
            began = time.perf_counter()
            x, y = next(batches)
            loop(x, y)
            times.append(time.perf_counter() - began)
            done += 1


class Clock:
    """Listens to a Trainer's laps, and notes the time from where a step's batch is fetched to where its optimizer has stepped."""

    def __init__(self, times: list[float]) -> None:
        self._times, self._began = times, 0.0

    def __call__(self, phase: str) -> None:
        if phase == "optimizer":
            self._times.append(time.perf_counter() - self._began)
        elif phase in ("", "other"):
            self._began = time.perf_counter()


def ours(backend: hvdtrain.Backend, model: nn.Module, data: ArrayDataset, times: list[float], steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = hvdtrain.Trainer(backend, model, optimizer, loss=cross_entropy, clip_norm=1.0)
    trainer.laps.listeners.append(Clock(times))
    trainer.fit(data, epochs=10**6, max_steps=steps, batch_size=BATCH)


def measure(backend: hvdtrain.Backend, name: str, width: int, depth: int, steps: int, rounds: int) -> dict[str, object]:
    torch.manual_seed(0)
    data = ArrayDataset(torch.randn(BATCH * 64, width), torch.randint(0, 10, (BATCH * 64,)))
    hand: list[float] = []
    trainer: list[float] = []
    for _ in range(rounds):
        for side, times in ((hand_written, hand), (ours, trainer)):
            fresh: list[float] = []
            torch.manual_seed(0)
            side(backend, mlp(width, depth), data, fresh, steps)
            times += fresh[max(5, steps // 10) :]  # the first steps warm up
    medians = statistics.median(hand) * 1e3, statistics.median(trainer) * 1e3
    result = {
        "model": name,
        "hand_written_ms": round(medians[0], 3),
        "trainer_ms": round(medians[1], 3),
        "ratio": round(medians[1] / medians[0], 4),
    }
    if backend.rank == 0:
        print(result, flush=True)
    return result


def agreement(backend: hvdtrain.Backend, width: int, depth: int, steps: int) -> dict[str, object]:
    """Steps with `Backend.ahead`, as streams have it, and without."""
    torch.manual_seed(0)
    model = mlp(width, depth)
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    x, y, total = torch.randn(BATCH, width), torch.randint(0, 10, (BATCH,)), BATCH * backend.world_size
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * steps):
        agree = number % 2 == 1
        began = time.perf_counter()
        ahead = backend.ahead(BATCH) if agree else None
        loss = cross_entropy(replica.model(x), y)
        replica.backward(loss, samples=BATCH, total=total)
        replica.step(clip_norm=1.0)
        if ahead is not None:
            total = ahead.total()
        if number > steps // 10:
            times[agree].append(time.perf_counter() - began)
    without, with_it = (statistics.median(times[agree]) * 1e3 for agree in (False, True))
    result: dict[str, object] = {
        "model": f"MLP {depth} x {width}, agreement on the next step's samples",
        "without_ms": round(without, 3),
        "with_ms": round(with_it, 3),
        "ratio": round(with_it / without, 4),
    }
    if backend.rank == 0:
        print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--backend", choices=list(by_hand), default="torch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    options: dict[str, Any] = HOROVODS_OWN if args.backend == "horovod" else {}
    with hvdtrain.init(args.backend, device="cpu", **options) as backend:
        results = [
            measure(backend, "MLP 3 x 384", 384, 3, args.steps, args.rounds),
            measure(backend, "MLP 8 x 1024", 1024, 8, max(30, args.steps // 4), args.rounds),
            agreement(backend, 384, 3, args.steps * args.rounds),
        ]
        if backend.rank == 0:
            machine = {
                "cpus": os.cpu_count(),
                "arch": platform.machine(),
                "python": platform.python_version(),
                "torch": str(torch.__version__),
            }
            print(
                json.dumps(
                    {
                        "benchmark": "overhead",
                        "backend": backend.name,
                        "world_size": backend.world_size,
                        "machine": machine,
                        "results": results,
                    }
                )
            )


if __name__ == "__main__":
    main()
