"""A job in which one rank goes wrong in one way at one moment: ``torchrun ... matrix_job.py FAULT CULPRIT MOMENT TIMEOUT BACKEND FOLDER``.

When it does, it notes the time in the folder. With the launcher "spawn" before these words the job starts its ranks itself.
"""

from __future__ import annotations

import builtins
import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

FAULT, CULPRIT, MOMENT, TIMEOUT_S, BACKEND, FOLDER = [word for word in sys.argv[1:] if word != "spawn"]


class Silent(Exception):
    def __str__(self):
        raise self

    __repr__ = __str__


class Unpicklable(BaseException):
    def __reduce__(self):
        raise TypeError("not to be pickled")


class Group(Exception):
    """Stands for ExceptionGroup where Python has none yet."""


def grouped():
    inner = ValueError("planted")
    inner.__cause__ = cause = KeyError("a cause that is its own")
    cause.__cause__ = inner
    of = getattr(builtins, "ExceptionGroup", None)
    return of("several", [inner, OSError("another")]) if of else Group("planted")


def chained():
    error = ValueError("planted")
    for depth in range(3000):
        deeper = ValueError(f"planted, {depth} causes deep")
        deeper.__cause__, error = error, deeper
    return error


def fill_the_disk():
    """From now on no file of this rank can grow, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def out_of_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, resource.RLIM_INFINITY))
    held = []
    while True:
        held.append(bytearray(2**24))


def fail(error):
    raise error


FAULTS = {
    "none": lambda: None,
    "exception": lambda: fail(ValueError("planted")),
    "exit-0": lambda: sys.exit(0),
    "exit-3": lambda: sys.exit(3),
    "os-exit-0": lambda: os._exit(0),
    "os-exit-3": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segv": lambda: ctypes.string_at(0),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "memory": out_of_memory,
    "silent": lambda: fail(Silent()),
    "large": lambda: fail(ValueError("planted" + "x" * 20_000_000)),
    "group": lambda: fail(grouped()),
    "chain": lambda: fail(chained()),
    "full-disk": fill_the_disk,
    "no-exception": lambda: fail(Unpicklable("planted")),
}


def go_wrong(moment, rank):
    if moment == MOMENT and rank == int(CULPRIT):
        file = Path(FOLDER) / "fault"
        if not file.exists():
            file.write_text(str(time.time()))
            FAULTS[FAULT]()


class Early:
    """Goes wrong while a rank that `spawn` has started takes its work out of its box."""

    def __reduce__(self):
        return explode, (list(sys.argv),)


def explode(argv):
    go_wrong("before", int(os.environ["HVDTRAIN_RANK"]))


def work(backend, _early=None):
    import torch
    from torch import nn

    import hvdtrain

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            if self.training and self.calls == 3:
                go_wrong("step", backend.rank)
                go_wrong("earlier", backend.rank)
                if MOMENT == "earlier":
                    time.sleep(2)  # the others begin their next operation well after it
            if not self.training:
                go_wrong("evaluation", backend.rank)
            return self.linear(x)

    class More:
        def state_dict(self):
            go_wrong("saving", backend.rank)
            return {"content": torch.zeros(50_000)}

        def load_state_dict(self, state):
            pass

    model = Model()
    trainer = hvdtrain.Trainer(
        backend, model, torch.optim.SGD(model.parameters(), lr=0.1), loss=nn.functional.cross_entropy
    )
    data = torch.utils.data.TensorDataset(torch.ones(40, 4), torch.zeros(40, dtype=torch.int64))
    trainer.fit(data, global_batch_size=8)
    trainer.evaluate(data)
    hvdtrain.LoopState(backend, trainer.replica, more=More()).save(hvdtrain.Checkpoints(Path(FOLDER) / "run"), 5)
    trainer.fit(data, epochs=2, global_batch_size=8)


def main():
    import hvdtrain

    if "spawn" in sys.argv:
        hvdtrain.spawn(work, 2, BACKEND, (Early(),), device="cpu", timeout_s=float(TIMEOUT_S))
        return
    from hvdtrain.launch.detect import detect

    rank = detect().topology.rank
    go_wrong("before", rank)

    assert hvdtrain.Trainer
    with hvdtrain.init(BACKEND, device="cpu", timeout_s=float(TIMEOUT_S)) as backend:
        work(backend)
    print(f"rank {rank} done")


if __name__ == "__main__":
    main()
