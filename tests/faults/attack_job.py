"""A job that works until it is told to stop, so that it can be attacked meanwhile: ``attack_job.py BACKEND FOLDER``."""

import os
import sys
import time
from pathlib import Path

import torch

import hvdtrain

TIMEOUT_S = 30
LONGEST_S = 120


def main():
    backend_name, folder = sys.argv[1], Path(sys.argv[2])
    with hvdtrain.init(backend_name, device="cpu", timeout_s=TIMEOUT_S) as backend:
        beside = folder / f"beside-{backend.rank}"
        beside.write_text(str(os.getpid()))
        beside.rename(folder / f"running-{backend.rank}")
        end = time.monotonic() + LONGEST_S
        steps = 0
        while not backend.all_gather_object((folder / "stop").exists() or time.monotonic() > end)[0]:
            backend.all_reduce(torch.ones(3))
            steps += 1
            (folder / f"steps-{backend.rank}").write_text(f"{steps}\n")
            time.sleep(0.05)
        rank = backend.rank
    print(f"rank {rank} done")


if __name__ == "__main__":
    main()
