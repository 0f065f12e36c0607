"""Peak memory and time of a step of a deep transformer, with and without activation checkpointing.

python benchmarks/activation_memory.py

Each way has a process of its own, in turns over several rounds, since memory that a process has had stays with it. Peak
memory is what the training steps add to the resident size that the process has with its model, its optimizer's state and
its gradients: activations, mostly. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import hvdtrain
from hvdtrain.tasks.byte_language_model import CausalTransformer
from hvdtrain.training.activation_checkpointing import checkpoint_activations

WAYS = ("none", "selective", "full")


def resident_mib(kind: str) -> float:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) / 1024
    raise SystemExit("this benchmark reads /proc/self/status, which is not here")


def measure(way: str, layers: int, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = CausalTransformer(context=128, width=128, layers=layers, heads=4, dropout=0.0)
    if way != "none":
        checkpoint_activations(model, r"layers\.layers\.\d+", policy=way)
    with hvdtrain.init("local", device="cpu") as backend:
        replica = backend.replicate(model, torch.optim.AdamW(model.parameters(), lr=1e-4))

        def step(windows: int) -> float:
            read = torch.arange(windows * 128).reshape(windows, 128) % 256
            began = time.perf_counter()
            replica.backward(model(read).square().mean(), samples=windows)
            replica.step()
            return time.perf_counter() - began

        step(1)  # the optimizer's state and the gradients
        before = resident_mib("VmRSS")
        seconds = [step(32) for _ in range(steps)]
        norm = float(torch.stack([p.detach().norm() for p in model.parameters()]).norm())
    return {"peak_mib": resident_mib("VmHWM") - before, "step_s": statistics.median(seconds), "norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help="measure this one, in this process")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.layers, args.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            argv = [sys.executable, __file__, "--way", way, "--layers", str(args.layers), "--steps", str(args.steps)]
            said = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[way].append(json.loads(said.splitlines()[-1]))
    result: dict[str, Any] = {
        way: {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        for way, rounds in found.items()
    }
    print(f"{'':10} {'peak MiB':>9} {'of none':>8} {'step s':>7} {'of none':>8}")
    for way in WAYS:
        peak, seconds = result[way]["peak_mib"], result[way]["step_s"]
        print(
            f"{way:10} {peak:9.0f} {peak / result['none']['peak_mib']:8.2f} {seconds:7.2f} {seconds / result['none']['step_s']:8.2f}"
        )
    print(
        json.dumps(
            {
                "benchmark": "activation_memory",
                "layers": args.layers,
                "result": result,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            }
        )
    )


if __name__ == "__main__":
    main()
