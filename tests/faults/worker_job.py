"""A rank that ends while one of its loader processes does not answer: ``python worker_job.py STATE END START [BACKEND]``.

STATE  stalled: inside a sample; stopped: by SIGSTOP; its own: stopped as well, in a loader iterated by another thread
END    done, raise, exit (sys.exit(3)), hard (os._exit(3)), wait (for somebody to kill this process)
START  fork, spawn, forkserver
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings

import torch
from torch.utils.data import Dataset

import hvdtrain
from hvdtrain.data.loader import make_loader

warnings.filterwarnings("ignore", message="This DataLoader will create")


class Data(Dataset):
    """Process 1 answers no more at its second batch."""

    def __init__(self, state):
        self.state = state

    def __len__(self):
        return 100

    def __getitem__(self, index):
        if index == 3:
            time.sleep(0.5)  # what it has loaded before is on its way
            if self.state == "stalled":
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGSTOP)
        return torch.tensor(index)


def work(state, end):
    loader = make_loader(Data(state), [[index] for index in range(100)], workers=2)
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    time.sleep(1.0)  # it is inside by now
    print(f"rank {os.getpid()}", flush=True)
    if end == "raise":
        sys.kept = batches  # as a traceback keeps it
        raise ValueError("planted")
    if end == "exit":
        sys.exit(3)
    if end == "hard":
        os._exit(3)
    if end == "wait":
        time.sleep(600)


def main():
    state, end, start, *backend = sys.argv[1:]
    multiprocessing.set_start_method(start)
    if backend:
        with hvdtrain.init(backend[0], device="cpu", timeout_s=60):
            work(state, end)
    elif state == "its own":
        thread = threading.Thread(target=work, args=("stalled", "done"))
        thread.start()
        time.sleep(600)
    else:
        work(state, end)


if __name__ == "__main__":
    main()
