"""What PowerSGD costs in accuracy: ours beside torch's `powerSGD_hook` under DDP, with the same settings, on the digits.

python benchmarks/powersgd.py

Two ranks by torchrun, a perceptron of two hidden layers of 128, global batch 64, a fixed learning rate; the mean over seeds of the
accuracy on the test part and of the loss on the training part. The last line of the output is one JSON object.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as hooks
from torch.nn.parallel import DistributedDataParallel

import hvdtrain
from hvdtrain.backends.base import Backend
from hvdtrain.data.digits import digits
from hvdtrain.training.models import mlp

STEPS, SEEDS, BATCH = 460, 6, 64
WAYS = (
    "plain",
    "powersgd:2",
    "torch 2 from 2",
    "powersgd:2,after=50",
    "torch 2 from 100",
    "powersgd:4",
    "torch 4 from 2",
)
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}


def hooked(model: nn.Module, rank: int, begin: int) -> DistributedDataParallel:
    """A model under DDP with torch's hook, which compresses what ours does: every matrix that becomes smaller."""
    state = hooks.PowerSGDState(
        None, matrix_approximation_rank=rank, start_powerSGD_iter=begin, min_compression_rate=1, orthogonalization_epsilon=0
    )  # fmt: skip
    replica = DistributedDataParallel(model)
    replica.register_comm_hook(state, hooks.powerSGD_hook)
    return replica


def batches(seed: int, samples: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from order[: samples // BATCH * BATCH].split(BATCH)


def trained(backend: Backend, way: str, kind: str, seed: int, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    model = mlp()
    optimizer = OPTIMIZERS[kind](model.parameters())
    if way.startswith("torch"):
        _, rank, _, begin = way.split()
        ddp = hooked(model, int(rank), int(begin))
    else:
        replica = backend.replicate(model, optimizer, compression=None if way == "plain" else way)
    for _, chosen in zip(range(STEPS), batches(seed + 100, len(x)), strict=False):
        mine = chosen[backend.rank :: backend.world_size]
        if way.startswith("torch"):
            nn.functional.cross_entropy(ddp(x[mine]), y[mine]).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            replica.backward(nn.functional.cross_entropy(model(x[mine]), y[mine]), samples=len(mine))
            replica.step()
    return model


@torch.no_grad()
def measured(backend: Backend, way: str, kind: str) -> dict[str, float]:
    train, test = digits(True), digits(False)
    x, y, test_x, test_y = *train.tensors, *test.tensors
    correct, losses = [], []
    for seed in range(SEEDS):
        with torch.enable_grad():
            model = trained(backend, way, kind, seed, x, y)
        correct.append(float((model(test_x).argmax(1) == test_y).double().mean()))
        losses.append(float(nn.functional.cross_entropy(model(x), y)))
    return {"accuracy": round(sum(correct) / SEEDS, 4), "train_loss": round(sum(losses) / SEEDS, 4)}


def rank() -> None:
    with hvdtrain.init("torch", device="cpu") as backend:
        found = {kind: {way: measured(backend, way, kind) for way in WAYS} for kind in OPTIMIZERS}
        if backend.rank == 0:
            about = {"world_size": backend.world_size, "torch": torch.__version__, "machine": platform.machine()}
            print(json.dumps({"benchmark": "powersgd", **about, "results": found}))


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank()
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__]
        sys.exit(subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode)
