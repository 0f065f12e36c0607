"""A job that works for some seconds, so that it can be attacked meanwhile: ``attack_job.py BACKEND SECONDS FOLDER``."""

import sys
import time
from pathlib import Path

import torch

import hvdtrain


def main():
    backend_name, seconds, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    with hvdtrain.init(backend_name, device="cpu", timeout_s=60) as backend:
        (folder / f"running-{backend.rank}").touch()
        end = time.monotonic() + seconds
        while not backend.all_gather_object(time.monotonic() > end)[0]:
            backend.all_reduce(torch.ones(3))
            time.sleep(0.05)
        rank = backend.rank
    print(f"rank {rank} done")


if __name__ == "__main__":
    main()
