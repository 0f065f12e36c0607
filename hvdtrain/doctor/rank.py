"""What each of two ranks runs: the backend that is chosen here, one all-reduce, one broadcast.

``mpirun -np 2 python -m hvdtrain.doctor.rank``
"""

from __future__ import annotations

import sys

import torch

import hvdtrain
from hvdtrain.doctor.asking import tell

_TIMEOUT_S = 60.0


def main() -> int:
    """Say how it went; 0 if every number was right."""
    with hvdtrain.init(device="cpu", timeout_s=_TIMEOUT_S) as backend:
        size = backend.world_size
        total = backend.all_reduce(torch.tensor([1.0 + backend.rank]))
        copied = backend.broadcast(torch.tensor([float(backend.rank)]), src=size - 1)
        right = total.item() == size * (size + 1) / 2 and copied.item() == size - 1
        tell(rank=backend.rank, size=size, backend=backend.name, engine=backend.engine, right=bool(right))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
