"""What each rank of ``hvdtrain bench step`` runs: ``python -m hvdtrain.bench.step_rank WISH CONTENDER FOLDER``.

The loop is that of Horovod's synthetic benchmark (https://github.com/horovod/horovod, examples/pytorch): the same batch in every
step, cross-entropy, SGD whose learning rate grows with the ranks; so many steps are timed together, so many times.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import hvdtrain
from hvdtrain.backends.device import choose_device
from hvdtrain.bench.gathered import write_own
from hvdtrain.bench.step_models import model_and_batch
from hvdtrain.bench.steps import ALONE, DDP, DDP_MPI4PY, HOROVOD
from hvdtrain.launch.detect import detect
from hvdtrain.memory import keep_freed_memory

Step = Callable[[], Tensor]
_LR = 0.01


def main() -> int:
    """Time the steps."""
    file, contender, folder = sys.argv[1:]
    wish = json.loads(Path(file).read_text())
    topology = detect().topology
    with ExitStack() as running:
        device = choose_device(wish["device"], topology)
        if device.type == "cpu":
            torch.set_num_threads(1)
        step = _prepared(running, contender, wish, device)
        first = [step().item() for _ in range(3)]
        for _ in range(wish["warmup"]):
            step()
        seconds = []
        _settle(device)
        wall = time.time()
        for _ in range(wish["iterations"]):
            began = time.perf_counter()
            for _ in range(wish["batches"]):
                step()
            _settle(device)
            seconds.append(time.perf_counter() - began)
        ended = time.time()
    found = {
        "seconds": seconds,
        "began": wall,
        "ended": ended,
        "third_loss": first[-1],
        "memory_bytes": torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    write_own(Path(folder), topology.rank, found)
    return 0


def _prepared(running: ExitStack, contender: str, wish: dict[str, Any], device: torch.device) -> Step:
    topology = detect().topology
    if contender == ALONE and device.type == "cpu":
        keep_freed_memory()
    if contender in (DDP, DDP_MPI4PY):
        if contender == DDP_MPI4PY:
            importlib.import_module("hvdtrain.mpi")  # registers the name
        dist.init_process_group("mpi4py" if contender == DDP_MPI4PY else "nccl" if device.type == "cuda" else "gloo")
        running.callback(dist.destroy_process_group)
    plain: Any = importlib.import_module("hvdtrain.bench.plain_horovod") if contender == HOROVOD else None
    if plain is not None:
        plain.start()
        running.callback(plain.stop)
    engine = contender not in (ALONE, DDP, DDP_MPI4PY, HOROVOD)
    backend = running.enter_context(hvdtrain.init(contender, device=wish["device"])) if engine else None
    model, x, y = model_and_batch(wish["model"], wish["batch_size"], wish["image_size"], topology.rank)
    model, x, y = model.to(device), x.to(device), y.to(device)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=_LR * topology.world_size)
    if backend is not None:
        replica = backend.replicate(model, optimizer)
        total = len(x) * topology.world_size

        def engine_step() -> Tensor:
            loss = cross_entropy(replica.model(x), y)
            replica.backward(loss, samples=len(x), total=total)
            replica.step()
            return loss

        return engine_step
    forward: Any = model
    if plain is not None:
        optimizer = plain.wrap(model, optimizer)
    elif contender != ALONE:
        forward = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
