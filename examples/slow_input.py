"""A task whose input is slow: `--profile` says so, and loader processes repair it.

cd examples
torchrun --nproc-per-node 2 -m hvdtrain --task slow_input:Slow --max-steps 40 --profile 20:30 --run-dir runs/slow
torchrun --nproc-per-node 2 -m hvdtrain --task slow_input:Slow --max-steps 40 --profile 20:30 --run-dir runs/repaired --workers 2
"""

import time

import torch
from torch import nn

SECONDS_A_SAMPLE = 0.004  # of waiting, as for a disk or a network


class Waits:
    """Samples that take their time."""

    def __len__(self):
        return 4000

    def __getitem__(self, i):
        time.sleep(SECONDS_A_SAMPLE)
        x = torch.randn(256, generator=torch.Generator().manual_seed(i))
        return x, int(x[0] > 0)


class Slow:
    def build_model(self):
        return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 2))

    def loss(self, model, batch):
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch)}

    def train_data(self):
        return Waits()

    def eval_data(self):
        return None
