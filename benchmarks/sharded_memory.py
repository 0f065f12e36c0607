"""What each rank holds of a model, its gradients and its optimizer's state, whole and cut over the ranks.

torchrun --nproc-per-node 2 benchmarks/sharded_memory.py

The two ways take turns in one process. Bytes are counted from the tensors, after a step's exchange; the peak of the process
is no measure here, because parts of a model are gathered in the same memory. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import hvdtrain
from hvdtrain.backends.base import Backend
from hvdtrain.tasks.byte_language_model import CausalTransformer

WAYS = {"whole": None, "sharded": r"layers\.layers\.\d+"}


def held_mib(tensors: Iterable[Any]) -> float:
    """Bytes of this rank's parts, in MiB."""
    own = [
        getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors if isinstance(tensor, Tensor)
    ]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in own)) / 2**20


def measure(backend: Backend, way: str, layers: int, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = CausalTransformer(context=64, width=256, layers=layers, heads=4, dropout=0.0).to(backend.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    replica = backend.replicate(model, optimizer, shard_modules=WAYS[way])
    read = torch.arange(8 * 64, device=backend.device).reshape(8, 64) % 256
    seconds, gradients = [], 0.0
    for _ in range(steps):
        backend.barrier()
        began = time.perf_counter()
        replica.backward(replica.model(read).square().mean(), samples=8)
        replica.reduce_gradients()
        gradients = held_mib(p.grad for p in model.parameters())
        replica.step()
        seconds.append(time.perf_counter() - began)
    state = held_mib(value for of in optimizer.state.values() for value in of.values())
    return {
        "parameters_mib": held_mib(model.parameters()),
        "gradients_mib": gradients,
        "state_mib": state,
        "step_s": statistics.median(seconds[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with hvdtrain.init(args.backend) as backend:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, measured in found.items():
                measured.append(measure(backend, way, args.layers, args.steps))
        result: dict[str, Any] = {
            way: {name: round(statistics.median(one[name] for one in rounds), 4) for name in rounds[0]}
            for way, rounds in found.items()
        }
        result |= {
            "backend": backend.name,
            "ranks": backend.world_size,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        if backend.rank == 0:
            print(json.dumps(result))


if __name__ == "__main__":
    main()
