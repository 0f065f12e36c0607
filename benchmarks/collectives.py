"""The all-reduce of every engine, from 4 bytes to 128 MB, in turns within one run.

python benchmarks/collectives.py                          # 2 ranks, one thread each
python benchmarks/collectives.py --ranks 4 --rounds 3 --out results.json --plot collectives.svg
python benchmarks/collectives.py --engines gloo mpi4py --dtype bfloat16

Engines: `gloo` (torch.distributed), `mpi4py` (hvdtrain's process group, through torch.distributed as well), `raw` (blocking
MPI_Allreduce by mpi4py, one call), `horovod` (its all-reduce, in place). Each engine is launched anew in every round, and the
order changes. A time is that of the slowest rank; the figure is the median over all rounds. Bus bandwidth is bytes / time
x 2(N-1)/N, so that it compares with what the memory or the network can do. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engines import machine, run_once

SIZES = [
    4,
    64,
    1024,
    16 * 2**10,
    64 * 2**10,
    256 * 2**10,
    2**20,
    4 * 2**20,
    8 * 2**20,
    16 * 2**20,
    32 * 2**20,
    128 * 2**20,
]
ENGINES = ("gloo", "mpi4py", "raw", "horovod")


def operation(engine: str) -> tuple[int, Callable[[torch.Tensor], object], Callable[[], object]]:
    """This rank's number, an in-place all-reduce, and how to end."""
    if engine in ("gloo", "mpi4py"):
        if engine == "mpi4py":
            import hvdtrain.mpi  # noqa: F401, PLC0415  (registers the name)
        dist.init_process_group(engine)
        return dist.get_rank(), dist.all_reduce, dist.destroy_process_group
    if engine == "raw":
        from mpi4py import MPI  # noqa: PLC0415  (one engine of several)

        world = MPI.COMM_WORLD
        return world.rank, lambda tensor: world.Allreduce(MPI.IN_PLACE, tensor.numpy()), lambda: None
    import horovod.torch as hvd  # noqa: PLC0415  (one engine of several)

    hvd.init()
    return hvd.rank(), lambda tensor: hvd.allreduce_(tensor, name="t", op=hvd.Sum), hvd.shutdown


def worker(engine: str, out: str, budget_s: float, dtype: torch.dtype) -> None:
    """One rank: time every size."""
    torch.set_num_threads(1)
    rank, all_reduce, stop = operation(engine)
    found: dict[str, list[float]] = {}
    for size in SIZES:
        tensor = torch.zeros(size // dtype.itemsize, dtype=dtype)
        count = max(3, min(200, int(budget_s / (2e-4 + size * 1.5e-9))))
        times = []
        for turn in range(count + 3):
            began = time.perf_counter()
            all_reduce(tensor)
            if turn >= 3:
                times.append(time.perf_counter() - began)
        found[str(size)] = times
    stop()
    Path(f"{out}.{rank}").write_text(json.dumps(found))


def missing(engine: str) -> str:
    module = {"mpi4py": "mpi4py", "raw": "mpi4py", "horovod": "horovod"}.get(engine)
    return f"{module} is not installed" if module and importlib.util.find_spec(module) is None else ""


def bus_gb_s(size: int, seconds: float, ranks: int) -> float:
    """What each rank sends at least, by its time, to four digits: small sizes are millionths of large ones."""
    return float(f"{size / seconds * 2 * (ranks - 1) / ranks / 1e9:.4g}")


def named(size: float) -> str:
    """As people say it: 4 B, 16 KB, 128 MB."""
    unit = 0
    while size >= 1024:
        size, unit = size / 1024, unit + 1
    return f"{size:g} {('B', 'KB', 'MB', 'GB')[unit]}"


def plot(whole: dict[str, Any], file: str) -> None:
    """Bus bandwidth over size."""
    import matplotlib  # noqa: PLC0415  (only with --plot)

    matplotlib.use("svg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(7, 4))
    medians = {int(size): each["median_us"] for size, each in whole["results"].items()}
    for engine in next(iter(medians.values())):
        rates = [bus_gb_s(size, each[engine] / 1e6, whole["world_size"]) for size, each in medians.items()]
        axes.plot(list(medians), rates, "o-", label=engine)
    axes.set(xscale="log", yscale="log", xlabel="size", ylabel="bus bandwidth, GB/s", title="all-reduce")
    axes.set_xticks(list(medians), [named(size) for size in medians], rotation=45)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "float16", "bfloat16"])
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for each size and round, about")
    parser.add_argument("--out", help="file for the JSON as well")
    parser.add_argument("--plot", help="file for a picture (needs matplotlib)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--to", help=argparse.SUPPRESS)
    parser.add_argument("--of", help="with --plot: a file that --out wrote, instead of measuring")
    args = parser.parse_args()
    if args.of:
        plot(json.loads(Path(args.of).read_text()), args.plot)
        return
    if args.worker:
        worker(args.worker, args.to, args.budget, getattr(torch, args.dtype))
        return
    engines = [engine for engine in args.engines if not missing(engine)]
    times: dict[str, dict[int, list[float]]] = {engine: {size: [] for size in SIZES} for engine in engines}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for engine in engines[turn % len(engines) :] + engines[: turn % len(engines)]:
                out = Path(folder) / f"{engine}{turn}"
                words = ["--worker", engine, "--to", str(out), "--budget", str(args.budget), "--dtype", args.dtype]
                problem = run_once(__file__, words, args.ranks, mpi=engine != "gloo")
                if problem:
                    print(f"{engine}: {problem}", file=sys.stderr, flush=True)
                    continue
                ranks = [json.loads(file.read_text()) for file in sorted(Path(folder).glob(f"{out.name}.*"))]
                for size in SIZES:
                    times[engine][size] += [max(each) for each in zip(*(one[str(size)] for one in ranks), strict=True)]
    results: dict[str, Any] = {}
    for size in SIZES:
        medians = {engine: statistics.median(times[engine][size]) for engine in engines if times[engine][size]}
        bus = {engine: bus_gb_s(size, value, args.ranks) for engine, value in medians.items()}
        results[str(size)] = {
            "median_us": {engine: round(value * 1e6, 1) for engine, value in medians.items()},
            "bus_gb_s": bus,
        }
        print(f"{size:>10}", results[str(size)]["median_us"], flush=True)
    whole = {
        "benchmark": "collectives",
        "world_size": args.ranks,
        "dtype": args.dtype,
        "machine": machine(),
        "results": results,
    }
    if args.plot:
        plot(whole, args.plot)
    if args.out:
        Path(args.out).write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(whole))


if __name__ == "__main__":
    main()
