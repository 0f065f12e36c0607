"""Trains a little under Horovod with settings from the command line, and prints what came of it as one JSON line.

mpirun -np 2 python tests/system/horovod_job.py '{"cycle_time_ms": 100}' [LATE_S [STEPS]]
"""

import json
import sys
import time

import torch
from torch import nn

import hvdtrain
from hvdtrain.errors import HvdtrainError


class Weights(nn.Module):
    """The gradient of each rank is what it is told."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 3))

    def forward(self, wanted):
        return (self.first * wanted).sum() + self.second.sum()


def main():
    options = json.loads(sys.argv[1])
    weightless = options.pop("weightless", False)  # nothing counts on rank 1
    late_s = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 20
    with hvdtrain.init("horovod", device="cpu", timeout_s=60, **options) as backend:
        model = Weights()
        replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.0))
        ranks = backend.world_size
        wanted = torch.zeros(4)
        wanted[backend.rank] = 1.0  # the ranks' gradients are orthogonal
        wanted[2] = 1 / 3
        for _ in range(steps):
            weight = 0 if weightless and backend.rank == 1 else 1
            replica.backward(replica.model(wanted), samples=1, weight=weight, total=ranks)
            replica.reduce_gradients()
            gradient = model.first.grad.tolist()
            replica.clear()
        if late_s and backend.rank == 1:
            time.sleep(late_s)
        error = ""
        began = time.perf_counter()
        try:
            for _ in range(5):
                backend.all_reduce(torch.ones(1))
        except HvdtrainError as caught:
            if not late_s:
                raise
            error = f"{caught} after {time.perf_counter() - began:.0f} s"
        seconds = time.perf_counter() - began
        if backend.rank == 0:
            print(json.dumps({"gradient": gradient, "seconds": seconds, "error": error}), flush=True)


if __name__ == "__main__":
    main()
