"""A training step on every engine, in turns within one run.

python benchmarks/engines.py                                  # 2 ranks, one thread each
python benchmarks/engines.py --ranks 4 --models mlp --rounds 3 --out results.json

Engines: `none` (every rank alone: what computing costs while the others compute too), `none-kept` (the same with
`hvdtrain.memory`), `ddp-silent` (DDP that exchanges nothing), `mpi-ddp` (DDP over the mpi4py group), `torch` (DDP over Gloo), `mpi`,
`horovod` (our backend with its defaults), `horovod-plain` (hand-written, horovod.torch.DistributedOptimizer with
Horovod's own defaults). Each engine is launched anew in every round, and the order changes, so that a slow minute of the
machine meets all of them; the figure is the median over all steps of all rounds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import hvdtrain
from hvdtrain.memory import keep_freed_memory

MODELS = {  # batch per rank, steps per round
    "mlp": (16, 40),
    "resnet18": (8, 12),
    "small": (16, 100),
    "many": (4, 60),  # 1,000 parameters: what each costs
}
ENGINES = ("none", "none-kept", "ddp-silent", "torch", "mpi-ddp", "mpi", "horovod", "horovod-plain")
WARM_UP = 8


def model_of(name: str) -> tuple[Any, Any, Any]:
    batch = MODELS[name][0]
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (batch,))
    if name == "resnet18":
        from torchvision.models import resnet18  # noqa: PLC0415  (belongs to this model alone)

        return resnet18(num_classes=10), torch.randn(batch, 3, 64, 64), labels
    if name == "many":
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(500))), torch.randn(batch, 8), labels % 8
    width, depth = (1024, 8) if name == "mlp" else (384, 3)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10)), torch.randn(batch, width), labels


def worker(engine: str, name: str, steps: int, out: str) -> None:
    """One rank: measure every step, and write this rank's times."""
    torch.set_num_threads(1)
    model, x, y = model_of(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rank, step, stop = prepare(engine, model, optimizer, x, y)
    times = []
    for _ in range(steps + WARM_UP):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    stop()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path(f"{out}.{rank}").write_text(json.dumps({"times": times[WARM_UP:], "peak_mb": peak}))


def prepare(
    engine: str, model: Any, optimizer: Any, x: Any, y: Any
) -> tuple[int, Callable[[], None], Callable[[], Any]]:

    def plain_step(forward: Any = model) -> None:
        loss = cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    if engine == "none-kept":
        keep_freed_memory()
    if engine.startswith("none"):
        return int(os.environ.get("RANK", "0")), plain_step, lambda: None
    if engine in ("ddp-silent", "mpi-ddp"):
        if engine == "mpi-ddp":
            importlib.import_module("hvdtrain.mpi")  # registers the name
        dist.init_process_group("gloo" if engine == "ddp-silent" else "mpi4py")
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if engine == "ddp-silent":
            ddp.register_comm_hook(None, lambda state, bucket: _kept(bucket))  # DDP looks at the names
        return dist.get_rank(), lambda: plain_step(ddp), dist.destroy_process_group
    if engine == "horovod-plain":
        import horovod.torch as hvd  # noqa: PLC0415  (one engine of several)

        hvd.init()
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        return hvd.rank(), plain_step, hvd.shutdown

    options: dict[str, Any] = {"process_sets": False} if engine == "horovod" else {}
    backend = hvdtrain.init(engine, device="cpu", **options)
    backend.start()
    replica = backend.replicate(model, optimizer)
    total = len(x) * backend.world_size

    def step() -> None:
        loss = cross_entropy(replica.model(x), y)
        replica.backward(loss, samples=len(x), total=total)
        replica.step()
        loss.item()

    return backend.rank, step, backend.stop


def _kept(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A communication hook that leaves every gradient as it is."""
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def launch(file: str, ranks: int, arguments: list[str], *, mpi: bool) -> list[str]:
    """Start each engine the way it is used: torchrun for what needs no MPI, mpirun for the rest."""
    if not mpi:
        return [
            sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
            "--nproc-per-node", str(ranks), file, *arguments,
        ]  # fmt: skip
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun"
    return [mpirun, "--bind-to", "none", "-np", str(ranks), sys.executable, file, *arguments]


def run_once(file: str, arguments: list[str], ranks: int, *, mpi: bool) -> str:
    """Run a benchmark's workers to their end.

    Returns:
        "", or what was said if they failed.
    """
    environment = {
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMP_NUM_THREADS": "1",
        **os.environ,
    }
    ended = subprocess.run(
        launch(file, ranks, arguments, mpi=mpi),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return "\n".join((ended.stderr or ended.stdout).strip().splitlines()[-12:]) if ended.returncode else ""


def measure(engine: str, name: str, ranks: int, steps: int, folder: Path) -> dict[str, Any] | str:
    out = folder / f"{engine}-{name}"
    for old in folder.glob(f"{out.name}.*"):
        old.unlink()
    arguments = ["--worker", engine, "--models", name, "--steps", str(steps), "--out", str(out)]
    problem = run_once(__file__, arguments, ranks, mpi=engine.startswith(("mpi", "horovod")))
    if problem:
        return problem
    found = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{out.name}.*"))]
    # A step lasts as long as that of the slowest rank.
    return {
        "times": [max(each) for each in zip(*(one["times"] for one in found), strict=True)],
        "peak_mb": max(one["peak_mb"] for one in found),
    }


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "cpus": os.cpu_count(),
        "arch": platform.machine(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def report(benchmark: str, args: argparse.Namespace, tried: list[str], results: dict[str, Any]) -> None:
    """Print what came out as one JSON object, and write it where ``--out`` says."""
    whole = {
        "benchmark": benchmark,
        "world_size": args.ranks,
        "machine": machine(),
        "not_installed": [engine for engine in tried if missing(engine)],
        "results": results,
    }
    if args.out:
        Path(args.out).write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


def missing(engine: str) -> str:
    for prefix, module in (("horovod", "horovod"), ("mpi", "mpi4py")):
        if engine.startswith(prefix) and importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--models", nargs="+", default=["mlp", "resnet18"], choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps per round")
    parser.add_argument("--out", help="file for the JSON as well")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.models[0], args.steps, args.out)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models:
            engines = [engine for engine in args.engines if not missing(engine)]
            times: dict[str, list[float]] = {engine: [] for engine in engines}
            peaks: dict[str, float] = {}
            for turn in range(args.rounds):
                order = engines[turn % len(engines) :] + engines[: turn % len(engines)]
                for engine in order:
                    found = measure(engine, name, args.ranks, args.steps or MODELS[name][1], Path(temporary))
                    if isinstance(found, str):
                        print(f"{engine} on {name}: {found}", file=sys.stderr, flush=True)
                        continue
                    times[engine] += found["times"]
                    peaks[engine] = max(peaks.get(engine, 0), found["peak_mb"])
            medians = {engine: statistics.median(each) * 1e3 for engine, each in times.items() if each}
            results[name] = {
                "median_ms": {engine: round(value, 2) for engine, value in medians.items()},
                "to_none": {
                    engine: round(value / medians["none"], 3) for engine, value in medians.items() if "none" in medians
                },
                "peak_mb": {engine: round(value) for engine, value in peaks.items()},
                "steps": {engine: len(each) for engine, each in times.items()},
            }
            print(name, json.dumps(results[name]), flush=True)
    report("engines", args, args.engines, results)


if __name__ == "__main__":
    main()
