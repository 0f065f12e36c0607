"""A rank of the mpi4py group that waits in blocking all-reduces, of which rank 1 stops or dies: waiting_job.py FAULT BYTES TIMEOUT_S.

FAULT: stop, kill (between two bytecodes, at any moment), stop-inside (after all ranks have come, before any byte moves), none.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from hvdtrain.mpi import operations  # registers the group

_LATER_S = 1.0


def main() -> None:
    fault, size, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("mpi4py", timeout=timedelta(seconds=timeout_s))
    tensor = torch.zeros(size // 4)
    dist.all_reduce(tensor)  # now known, so that the next ones go the short way
    if dist.get_rank() == 1 and fault in ("stop", "kill"):
        how = signal.SIGSTOP if fault == "stop" else signal.SIGKILL
        threading.Timer(_LATER_S, lambda: os.kill(os.getpid(), how)).start()
    if dist.get_rank() == 1 and fault == "stop-inside":
        as_ever, began = operations.all_reduce_, time.monotonic()

        def stopping(*args: object) -> None:
            if time.monotonic() - began > _LATER_S:
                os.kill(os.getpid(), signal.SIGSTOP)
            as_ever(*args)

        operations.all_reduce_ = stopping
    end, count = time.monotonic() + (4 * _LATER_S if fault == "none" else 600), torch.zeros(())
    while not count.item():
        dist.all_reduce(tensor)
        count.fill_(float(time.monotonic() > end))
        dist.all_reduce(count)
    print(f"rank {dist.get_rank()} done", flush=True)
    dist.destroy_process_group()


main()
