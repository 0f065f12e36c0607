"""torch.compile: eager and compiled steps of hvdtrain and of plain DDP, in turns within one run.

python benchmarks/compile.py                                  # 2 ranks, one thread each
python benchmarks/compile.py --models transformer --rounds 5 --out results.json

Ways: `ddp` and `ddp-compiled` (a plain torch script with DistributedDataParallel over Gloo, without and with
`torch.compile(ddp)`), `torch`, `mpi` and `horovod` (our backends with their defaults), and the same `-compiled`, compiled as
`--compile` does. Each way is launched anew in every round, and the order changes; the figure is the median over all steps of all
rounds. Each compiled way keeps torch's cache of compiled code for itself: the first round compiles everything
(`compile_s`, up to the end of the first step, of the slowest rank), later rounds read the cache (`cached_compile_s`). `loss_off` is
how far the last step's loss is from that of `ddp`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launching import missing, model_of, report, run_once
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import hvdtrain
from hvdtrain.tasks.byte_language_model import CausalTransformer
from hvdtrain.training.compiling import compile_ahead, compile_module

STEPS = {"transformer": 20, "mlp": 40, "resnet18": 12, "small": 100}
WAYS = ("ddp", "ddp-compiled", "torch", "torch-compiled", "mpi", "mpi-compiled", "horovod", "horovod-compiled")
DEFAULT_WAYS = WAYS[:6]
WARM_UP = 8


def job_of(name: str) -> tuple[Any, Any, Any]:
    """Model, inputs and targets; a model's output is flattened to (predictions, classes)."""
    if name != "transformer":
        return model_of(name)
    torch.manual_seed(0)
    model = CausalTransformer(context=128, width=256, layers=4, heads=4, dropout=0.0)
    return model, torch.randint(0, 256, (8, 128)), torch.randint(0, 256, (8 * 128,))


def worker(way: str, name: str, out: str) -> None:
    """One rank: what the first step took, and the seconds of every step after it."""
    torch.set_num_threads(1)
    model, x, y = job_of(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    engine, _, compiled = way.partition("-")
    with contextlib.ExitStack() as running:
        prepare = plain if engine == "ddp" else ours
        began = time.perf_counter()
        rank, step = prepare(running, engine, bool(compiled), model, optimizer, x, y)
        step()
        first_s = time.perf_counter() - began
        times, losses = [], []
        for _ in range(STEPS[name] + WARM_UP):
            began = time.perf_counter()
            losses.append(step())
            times.append(time.perf_counter() - began)
    counters = torch._dynamo.utils.counters
    found = {
        "first_s": first_s,
        "times": times[WARM_UP:],
        "loss": losses[-1],
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }
    Path(f"{out}.{rank}").write_text(json.dumps(found))


def plain(
    running: contextlib.ExitStack, engine: str, compiled: bool, model: Any, optimizer: Any, x: Any, y: Any
) -> tuple[int, Callable[[], float]]:
    """A script of torch's own means."""
    dist.init_process_group("gloo")
    running.callback(dist.destroy_process_group)
    forward: Any = DistributedDataParallel(model, gradient_as_bucket_view=True)
    if compiled:
        forward = torch.compile(forward)

    def step() -> float:
        loss = cross_entropy(forward(x).flatten(0, -2), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return dist.get_rank(), step


def ours(
    running: contextlib.ExitStack, engine: str, compiled: bool, model: Any, optimizer: Any, x: Any, y: Any
) -> tuple[int, Callable[[], float]]:
    """The same on one of our backends, compiled as the Trainer compiles."""
    if compiled:
        compile_module(model)
    backend = running.enter_context(hvdtrain.init(engine, device="cpu"))
    replica = backend.replicate(model, optimizer)
    total = len(x) * backend.world_size
    if compiled:
        compile_ahead(backend, replica, lambda module: cross_entropy(module(x).flatten(0, -2), y))

    def step() -> float:
        loss = cross_entropy(replica.model(x).flatten(0, -2), y)
        replica.backward(loss, samples=len(x), total=total)
        replica.step()
        return loss.item()

    return backend.rank, step


def measure(way: str, name: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Launch a way once; a way that fails ends the benchmark with what it said."""
    out = folder / f"{way}-{name}"
    for old in folder.glob(f"{out.name}.*"):
        old.unlink()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled" / out.name)
    launcher = "mpirun" if way.startswith(("mpi", "horovod")) else "torchrun"
    problem = run_once(__file__, ["--worker", way, name, str(out)], ranks, launcher=launcher)
    if problem:
        raise SystemExit(f"{way} on {name}: {problem}")
    found = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{out.name}.*"))]
    # A step lasts as long as that of the slowest rank.
    return {
        "times": [max(each) for each in zip(*(one["times"] for one in found), strict=True)],
        "first_s": max(one["first_s"] for one in found),
        **{what: found[0][what] for what in ("loss", "graphs", "breaks")},
    }


def figures(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """What is shown of each way, from its rounds."""
    shown: dict[str, dict[str, float]] = {}
    for way, rounds in runs.items():
        times = [seconds for one in rounds for seconds in one["times"]]
        shown[way] = {"median_ms": round(statistics.median(times) * 1e3, 2), "steps": len(times)}
        if "ddp" in runs:
            shown[way]["loss_off"] = abs(rounds[0]["loss"] / runs["ddp"][0]["loss"] - 1)
        if way.endswith("-compiled"):
            firsts = [one["first_s"] for one in rounds]
            shown[way] |= {what: rounds[0][what] for what in ("graphs", "breaks")}
            shown[way]["compile_s"] = round(firsts[0], 1)
            if firsts[1:]:
                shown[way]["cached_compile_s"] = round(statistics.median(firsts[1:]), 1)
    for way, values in shown.items():
        for other in ("ddp-compiled", way.removesuffix("-compiled")):
            if other in shown and other != way:
                values[f"to_{other}"] = round(values["median_ms"] / shown[other]["median_ms"], 3)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(DEFAULT_WAYS), choices=WAYS)
    parser.add_argument("--models", nargs="+", default=["transformer", "resnet18"], choices=list(STEPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="file for the JSON as well")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in args.models:
            ways = [way for way in args.ways if not missing(way)]
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
            for turn in range(args.rounds):
                shift = turn % len(ways)
                for way in ways[shift:] + ways[:shift]:
                    runs[way].append(measure(way, name, args.ranks, Path(temporary)))
            results[name] = figures(runs)
            print(name, json.dumps(results[name]), flush=True)
    report("compile", args, args.ways, results)


if __name__ == "__main__":
    main()
