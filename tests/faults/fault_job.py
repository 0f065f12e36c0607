"""A job of ranks in which one goes wrong: ``torchrun --nproc-per-node 3 tests/faults/fault_job.py MODE TIMEOUT BACKEND``."""

import os
import signal
import sys
import time

import torch
from torch import nn

import hvdtrain

CULPRIT = 1


class Faulty(nn.Module):
    def __init__(self, mode, rank):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.mode, self.rank, self.calls = mode, rank, 0

    def forward(self, x):
        self.calls += 1
        if self.rank == CULPRIT and self.calls == 3:
            if self.mode == "raise":
                raise ValueError("planted in the model")
            if self.mode == "exit":
                sys.exit(0)
            if self.mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.mode == "stall":
                time.sleep(60)
            if self.mode == "leave":
                raise Leave
        return self.linear(x)


class Leave(Exception):
    pass


class Stream(torch.utils.data.IterableDataset):
    """Every rank's own part, of which that of one rank cannot be read to its end."""

    def shard(self, num_shards, index):
        self.bad = index == CULPRIT
        return self

    def __iter__(self):
        for number in range(90):
            if self.bad and number == 40:
                raise ValueError("planted in the stream")
            yield torch.ones(4), torch.zeros((), dtype=torch.int64)


def of_a_stream(backend):
    model = nn.Linear(4, 2)
    trainer = hvdtrain.Trainer(
        backend, model, torch.optim.SGD(model.parameters(), lr=0.1), loss=nn.functional.cross_entropy
    )
    trainer.fit(Stream(), batch_size=4)


def alone(mode, backend):
    """Rank 0 does alone what all ranks must do; the others train on, or are done."""
    model = nn.Linear(4, 2)
    trainer = hvdtrain.Trainer(
        backend, model, torch.optim.SGD(model.parameters(), lr=0.1), loss=nn.functional.cross_entropy
    )
    data = torch.utils.data.TensorDataset(torch.ones(30, 4), torch.zeros(30, dtype=torch.int64))
    trainer.fit(data, global_batch_size=15)
    if backend.rank == 0:
        if mode.startswith("save"):
            hvdtrain.LoopState(backend, trainer.replica).save(hvdtrain.Checkpoints("/nowhere/at/all"), 2)
        else:
            trainer.evaluate(data)
    if mode == "evaluate-fit":
        trainer.fit(data, epochs=2, global_batch_size=15)
    elif mode == "evaluate-evaluate":
        trainer.evaluate(torch.utils.data.Subset(data, range(20)))
    elif mode != "evaluate-leave":
        loss = trainer.replica.model(torch.randn(8, 4)).square().mean()
        trainer.replica.backward(loss, samples=8, total=8 * backend.world_size)
        trainer.replica.step()


def main():
    mode, timeout_s = sys.argv[1], float(sys.argv[2])
    with hvdtrain.init(sys.argv[3], device="cpu", timeout_s=timeout_s) as backend:
        if "-" in mode:
            alone(mode, backend)
            return
        if mode == "stream":
            of_a_stream(backend)
        model = Faulty(mode, backend.rank)
        replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
        try:
            for _ in range(5):
                if mode == "collective" and backend.rank == CULPRIT:
                    raise ValueError("planted between collectives")
                if mode == "subset" and backend.rank == CULPRIT:
                    time.sleep(60)
                if mode == "subset":
                    backend.all_reduce(torch.ones(3, 5))
                if mode == "message" and backend.rank != CULPRIT:
                    backend.recv(CULPRIT)
                if mode == "message":
                    time.sleep(60)
                if mode == "collective":
                    backend.all_reduce(torch.ones(3))
                loss = replica.model(torch.randn(8, 4)).square().mean()
                replica.backward(loss, samples=8, total=8 * backend.world_size)
                replica.step()
        except Leave:  # the user's code swallows it and goes on to the end of the with block
            pass
        rank = backend.rank
        groups = []
        if mode.startswith("groups"):
            groups = [backend.group(range(backend.world_size)) for _ in range(30)]
        if mode == "groups early":
            groups.clear()
    groups.clear()  # garbage, which another thread frees
    print(f"rank {rank} done")


if __name__ == "__main__":
    main()
