"""What each of two ranks runs to try a Horovod that was just installed: an all-reduce, and what it was built with.

``horovodrun -np 2 python -m hvdtrain.horovod_build.trial``. Rank 0 writes one line of JSON after `MARK`.
"""

from __future__ import annotations

import json
import sys

import horovod.torch as hvd
import torch

MARK = "hvdtrain trial: "
RANKS = 2


def main() -> int:
    """Add up one number from each rank; 0 if the sum is right."""
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    if size != RANKS:
        sys.stderr.write(f"{size} ranks came together instead of {RANKS}\n")
        return 1
    total = hvd.allreduce(torch.arange(5.0) + rank, op=hvd.Sum, name="trial")
    if total.tolist() != [1.0, 3.0, 5.0, 7.0, 9.0]:
        sys.stderr.write(f"rank {rank}: the sum came out as {total.tolist()}\n")
        return 1
    if rank == 0:
        found = {"mpi": bool(hvd.mpi_built()), "gloo": bool(hvd.gloo_built()), "nccl": bool(hvd.nccl_built())}
        sys.stdout.write(MARK + json.dumps(found) + "\n")
        sys.stdout.flush()
    hvd.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
