"""Writes a checkpoint in the middle of an epoch, and goes on from others to the end; prints nothing, writes JSON.

mpirun -np 3 python tests/system/resume_job.py mpi OUT.json [--write FOLDER] [FOLDER ...]
"""

import json
import sys
from itertools import chain
from pathlib import Path

import torch
from torch import nn

import hvdtrain

STOP = 7  # of 15 steps: 23 samples in global batches of 5, three times
ENDS = {"epochs": 3, "global_batch_size": 5}


def data():
    """Each sample's label is its number, so that a batch says what is in it."""
    return torch.utils.data.TensorDataset(
        torch.linspace(-1, 1, 92, dtype=torch.float64).reshape(23, 4).sin(), torch.arange(23)
    )


class Noting:
    """A loss and a logger: which samples this rank had in each step, and the loss over all ranks."""

    def __init__(self):
        self.batches, self.steps, self.losses = [], [], []

    def __call__(self, output, numbers):
        if torch.is_grad_enabled():
            self.batches.append(numbers.tolist())
        return nn.functional.cross_entropy(output, numbers % 3)

    def log_step(self, record):
        # Before the first step after a resume one pass is rehearsed, on samples that are none of the step's.
        mine = self.batches if self.steps else self.batches[-1:]
        self.steps.append([*chain(*mine)])
        self.losses.append(record.loss)
        self.batches.clear()

    def log_eval(self, record):
        pass

    def close(self):
        pass


def trained(backend, *, checkpoints=None, resume_from=None, **ends):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    noting = Noting()
    trainer = hvdtrain.Trainer(
        backend, model, optimizer, loss=noting, schedule=torch.optim.lr_scheduler.StepLR(optimizer, 4),
        schedule_interval="step", precision="fp64", clip_norm=0.5, logger=noting, log_every=1, checkpoints=checkpoints,
    )  # fmt: skip
    result = trainer.fit(data(), data(), resume_from=resume_from, **(ENDS | ends))
    everyone = backend.all_gather_object(noting.steps)
    return {
        "steps": result.steps,
        "train_loss": result.train_loss,
        "eval_loss": result.eval_metrics["loss"],
        "losses": noting.losses,
        "batches": [sorted(chain(*(rank[step] for rank in everyone))) for step in range(len(noting.steps))],
        "parameters": torch.cat([value.flatten() for value in model.state_dict().values()]).tolist(),
    }


def write(backend, folder):
    trained(backend, checkpoints=hvdtrain.Checkpoints(folder), max_steps=STOP)


def resumed(backend, folder):
    return trained(backend, resume_from=hvdtrain.Checkpoints(folder).find(backend))


def main():
    name, out, *words = sys.argv[1:]
    with hvdtrain.init(name, device="cpu", timeout_s=120) as backend:
        if words[:1] == ["--write"]:
            write(backend, words[1])
            words = words[2:]
        found = {folder: resumed(backend, folder) for folder in words}
        if backend.rank == 0:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
