"""What PowerSGD costs in accuracy: ours beside torch's `powerSGD_hook` under DDP, with the same settings.

python benchmarks/powersgd.py
python benchmarks/powersgd.py images --steps 1840 --optimizers SGD

Two ranks by torchrun, global batch 64, a fixed learning rate; the mean over seeds of the accuracy on the test part and of the loss on
the training part. On the digits a perceptron of two hidden layers of 128; `images` are 5,000 made ones of CIFAR-10's shape (3 x 32 x 32, ten
classes, each a pattern that is moved about, under noise), and a network of three convolutions. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
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

BATCH = 64
SEEDS = {"digits": 6, "images": 3}
RATES = {"digits": 0.05, "images": 0.01}  # SGD's: with 0.05 some seeds of the convolutions learn nothing
WAYS = (
    "plain",
    "powersgd:2",
    "torch 2 from 2",
    "powersgd:2,after=50",
    "torch 2 from 100",
    "powersgd:4",
    "torch 4 from 2",
)
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters, _: torch.optim.AdamW(parameters, lr=1e-3),
    "SGD": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
}


def images(train: bool) -> tuple[Tensor, Tensor]:
    """Patterns of ten classes, cyclically moved by up to 8 pixels, under noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn((10, 3, 8, 8), generator=generator)
    patterns = nn.functional.interpolate(coarse, scale_factor=4.0, mode="bilinear")
    generator.manual_seed(1 + train)
    count = 5000 if train else 2000
    y = torch.randint(10, (count,), generator=generator)
    moved = torch.randint(-8, 9, (count, 2), generator=generator).tolist()
    x = torch.stack([patterns[label].roll(by, (1, 2)) for label, by in zip(y.tolist(), moved, strict=True)])
    return (x + 2.5 * torch.randn(x.shape, generator=generator)) / 2.6, y


def cnn() -> nn.Module:
    def layer(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

    layers = [*layer(3, 32), *layer(32, 64), *layer(64, 64), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, 10))


DATA: dict[str, tuple[Callable[[bool], tuple[Tensor, ...]], Callable[[], nn.Module]]] = {
    "digits": (lambda train: digits(train).tensors, mlp),
    "images": (images, cnn),
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


def trained(backend: Backend, data: str, way: str, kind: str, seed: int, steps: int, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    model = DATA[data][1]()
    optimizer = OPTIMIZERS[kind](model.parameters(), RATES[data])
    if way.startswith("torch"):
        _, rank, _, begin = way.split()
        ddp = hooked(model, int(rank), int(begin))
    else:
        replica = backend.replicate(model, optimizer, compression=None if way == "plain" else way)
    for _, chosen in zip(range(steps), batches(seed + 100, len(x)), strict=False):
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
def measured(backend: Backend, data: str, way: str, kind: str, steps: int) -> dict[str, float]:
    load, _ = DATA[data]
    x, y, test_x, test_y = *load(True), *load(False)
    correct, losses = [], []
    for seed in range(SEEDS[data]):
        with torch.enable_grad():
            model = trained(backend, data, way, kind, seed, steps, x, y)
        correct.append(float((model(test_x).argmax(1) == test_y).double().mean()))
        losses.append(float(nn.functional.cross_entropy(model(x), y)))
    seeds = len(correct)
    return {"accuracy": round(sum(correct) / seeds, 4), "train_loss": round(sum(losses) / seeds, 4)}


def rank(asked: argparse.Namespace) -> None:
    with hvdtrain.init("torch", device="cpu") as backend:
        found = {
            kind: {way: measured(backend, asked.data, way, kind, asked.steps) for way in WAYS}
            for kind in asked.optimizers
        }
        if backend.rank == 0:
            about = {
                "world_size": backend.world_size,
                "torch": torch.__version__,
                "machine": platform.machine(),
                "data": asked.data,
                "steps": asked.steps,
            }
            print(json.dumps({"benchmark": "powersgd", **about, "results": found}))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", choices=list(DATA), default="digits")
    parser.add_argument("--steps", type=int, default=460)
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    return parser


if __name__ == "__main__":
    asked = arguments().parse_args()
    if "RANK" in os.environ:
        rank(asked)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *sys.argv]
        sys.exit(subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode)
