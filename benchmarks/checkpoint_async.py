"""How long a checkpoint blocks training: written at once, written beside it, and the copy to host memory alone.

python benchmarks/checkpoint_async.py
torchrun --nproc-per-node 2 benchmarks/checkpoint_async.py --mib 400

A model with AdamW, whose state is three times the model, is saved several times by `hvdtrain.LoopState`; between saves there
are training steps. Blocked is the time within `save`; the copy is that of the same tensors, one after the other, measured in
turn with it; their ratio is that of the least of each, since other work on the machine only adds to them. For training steps
while a checkpoint is being written the median is given beside that of undisturbed ones.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import hvdtrain

WIDTH = 1024


def clock(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)


class Loop:
    def __init__(self, backend: hvdtrain.Backend, mib: int) -> None:
        torch.manual_seed(0)
        layers = max(1, mib // 3 * 2**20 // (4 * WIDTH * WIDTH))
        self.backend = backend
        self.model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(layers)]).to(backend.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.replica = backend.replicate(self.model, self.optimizer)
        self.state = hvdtrain.LoopState(backend, self.replica)
        self.batch = torch.randn(2, WIDTH, device=backend.device)
        self.step()

    def step(self) -> None:
        self.replica.backward(self.replica.model(self.batch).square().mean(), samples=2)
        self.replica.step()
        if self.backend.device.type == "cuda":
            torch.cuda.synchronize()

    def all_tensors(self) -> list[Tensor]:
        return [*tensors(self.model.state_dict()), *tensors(self.optimizer.state_dict()["state"])]

    def copy(self) -> None:
        copies = [one.detach().to("cpu", copy=True) for one in self.all_tensors()]
        del copies


def measure(loop: Loop, checkpoints: hvdtrain.Checkpoints, rounds: int, first: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"blocked": [], "copy": [], "steps": []}
    for number in range(rounds):
        times["copy"].append(clock(loop.copy))
        times["blocked"].append(clock(partial(loop.state.save, checkpoints, first + number)))
        times["steps"] += [clock(loop.step) for _ in range(5)]
        checkpoints.settle(loop.backend)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=300, help="of the model and the optimizer's state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    with hvdtrain.init(args.backend, device=args.device) as backend:
        loop = Loop(backend, args.mib)
        folder = backend.broadcast_object(tempfile.mkdtemp() if backend.rank == 0 else "")
        at_once = measure(loop, hvdtrain.Checkpoints(f"{folder}/a", keep=1), args.rounds, 1)
        checkpoints = hvdtrain.AsyncCheckpoints(f"{folder}/b", keep=1)
        beside = measure(loop, checkpoints, args.rounds, 1)
        undisturbed = [clock(loop.step) for _ in range(15)]
        if backend.rank == 0:
            shutil.rmtree(folder)
            machine = {
                "cpus": os.cpu_count(),
                "arch": platform.machine(),
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "device": torch.cuda.get_device_name() if backend.device.type == "cuda" else "cpu",
            }
            print(
                json.dumps(
                    {
                        "benchmark": "checkpoint_async",
                        "backend": backend.name,
                        "world_size": backend.world_size,
                        "machine": machine,
                        "state_mib": sum(one.nbytes for one in loop.all_tensors()) // 2**20,
                        "copy_ms": round(1e3 * statistics.median(beside["copy"]), 1),
                        "blocked_at_once_ms": round(1e3 * statistics.median(at_once["blocked"]), 1),
                        "blocked_beside_ms": round(1e3 * statistics.median(beside["blocked"]), 1),
                        "first_blocked_beside_ms": round(1e3 * beside["blocked"][0], 1),
                        "blocked_by_copy": round(min(beside["blocked"]) / min(beside["copy"]), 3),
                        "step_ms": round(1e3 * statistics.median(undisturbed), 1),
                        "step_while_writing_ms": round(1e3 * statistics.median(beside["steps"]), 1),
                    }
                )
            )


if __name__ == "__main__":
    main()
