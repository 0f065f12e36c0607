"""Horovod's API: the real Horovod over MPI and over Gloo, and `hvdtrain.horovod` over each, in turns within one run.

python benchmarks/horovod_api.py                                   # 2 ranks, one thread each
python benchmarks/horovod_api.py --models resnet18 --rounds 5 --out results.json

For each engine: images/s of the loop of Horovod's synthetic benchmark (random images, `DistributedOptimizer`, SGD), and the time of an
allreduce of one float32 by name. Each engine is launched anew in every round, and the order changes; the figures are medians over
all rounds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from launching import model_of, run_once
from torch.nn.functional import cross_entropy

from hvdtrain.cli.trials import environment

LAUNCHERS = {
    "horovod": "mpirun",
    "horovod-gloo": "horovodrun --gloo",
    "mpi": "mpirun",
    "torch": "torchrun",
}  # of each engine
STEPS = {"mlp": 40, "resnet18": 12, "small": 100, "many": 40}
WARM_UP = 8
REPEATS = 300


def worker(engine: str, name: str, out: str) -> None:
    """One rank: images/s of every step, and microseconds of every allreduce."""
    torch.set_num_threads(1)
    real = engine.startswith("horovod")
    if not real:
        os.environ["HVDTRAIN_BACKEND"] = engine
    hvd: Any = importlib.import_module("horovod.torch" if real else "hvdtrain.horovod")
    hvd.init()
    model, x, y = model_of(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    rates, latencies = [], []
    for _ in range(STEPS[name] + WARM_UP):
        began = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        rates.append(len(x) / (time.perf_counter() - began))
    small = torch.ones(1)
    for _ in range(REPEATS + WARM_UP):
        began = time.perf_counter()
        hvd.allreduce(small, name="small")
        latencies.append((time.perf_counter() - began) * 1e6)
    found = {"rates": rates[WARM_UP:], "latencies": latencies[WARM_UP:]}
    Path(f"{out}.{hvd.rank()}").write_text(json.dumps(found))
    hvd.shutdown()


def measured(engine: str, name: str, ranks: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "times")
        problem = run_once(__file__, ["--worker", engine, name, out], ranks, launcher=LAUNCHERS[engine])
        if problem:
            raise SystemExit(f"{engine}, {name}: {problem}")
        return dict(json.loads(Path(f"{out}.0").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mlp"])
    parser.add_argument("--engines", nargs="+", default=list(LAUNCHERS))
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    figures: dict[str, Any] = {}
    for name in args.models:
        found: dict[str, dict[str, list[float]]] = {engine: {"rates": [], "latencies": []} for engine in args.engines}
        for turn in range(args.rounds):
            shift = turn % len(args.engines)
            for engine in args.engines[shift:] + args.engines[:shift]:
                for key, values in measured(engine, name, args.ranks).items():
                    found[engine][key] += values
        figures[name] = {
            engine: {
                "images_per_s": round(args.ranks * statistics.median(values["rates"]), 1),
                "allreduce_4_bytes_us": round(statistics.median(values["latencies"]), 1),
            }
            for engine, values in found.items()
        }
        print(name, figures[name], flush=True)
    text = json.dumps(
        {
            "benchmark": "horovod_api",
            "world_size": args.ranks,
            **environment(),
            "rounds": args.rounds,
            "figures": figures,
        }
    )
    if args.out:
        Path(args.out).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
