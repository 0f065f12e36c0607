"""From the command to the first training step, and what of it is not ours.

python benchmarks/startup.py                      # 2 ranks, five times each, in turns

`python` and `import torch` are what any program pays; `--help` is ours without torch; the rest is the main job on the built-in
digits from the launcher's start to the moment when its first step is written to metrics.jsonl. Seconds, medians.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hvdtrain.cli.trials import environment

BIN = Path(sys.executable).parent


def commands(ranks: int) -> dict[str, list[str]]:
    job = ["-m", "hvdtrain", "--max-steps", "1", "--log-every", "1", "--timeout", "60"]
    mpirun = [str(BIN / "mpirun"), "--bind-to", "none", "--oversubscribe", "-np", str(ranks), sys.executable]
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        "--nproc-per-node", str(ranks),
    ]  # fmt: skip
    return {
        "python": [sys.executable, "-c", "pass"],
        "import hvdtrain": [sys.executable, "-c", "import hvdtrain"],
        "import torch": [sys.executable, "-c", "import torch"],
        "--help": [sys.executable, "-m", "hvdtrain", "--help"],
        "python -m hvdtrain": [sys.executable, *job],
        "torchrun": [*torchrun, *job],
        "mpirun, mpi": [*mpirun, *job, "--backend", "mpi"],
        "mpirun, horovod": [*mpirun, *job, "--backend", "horovod"],
        "horovodrun --gloo": [str(BIN / "horovodrun"), "--gloo", "-np", str(ranks), sys.executable, *job],
    }


def seconds(argv: list[str]) -> float:
    """Until the first step is written, or until the end of a program that takes none."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder:
        trains = "--max-steps" in argv
        log = Path(folder) / "metrics.jsonl"
        began = time.monotonic()
        first = 0.0
        with subprocess.Popen(
            [*argv, "--run-dir", folder] if trains else argv,
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            while process.poll() is None:
                if trains and not first and log.exists() and log.stat().st_size:
                    first = time.monotonic() - began
                time.sleep(0.005)
            ended = time.monotonic() - began
            if process.returncode:
                raise RuntimeError((process.stderr.read() if process.stderr else "")[-800:])
    return first if trains else ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="file for the JSON as well")
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, argv in commands(args.ranks).items():
            try:
                found.setdefault(name, []).append(seconds(argv))
            except (RuntimeError, OSError) as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
    medians = {name: round(statistics.median(times), 3) for name, times in found.items() if times}
    for name, value in medians.items():
        print(f"{name:<20}{value:7.3f} s")
    whole = {"benchmark": "startup", "world_size": args.ranks, **environment(), "median_s": medians}
    if args.out:
        Path(args.out).write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


if __name__ == "__main__":
    main()
