"""A task whose steps take as long as those of a real model, so that no checkpoint is written by mere luck."""

import os
import time

import torch
from torch import nn

STEP_S = float(os.environ.get("SLOW_TASK_STEP_S", "0.7"))


class Slow:
    def build_model(self):
        return nn.Linear(8, 2)

    def loss(self, model, batch):
        time.sleep(STEP_S)
        inputs, targets = batch
        return nn.functional.cross_entropy(model(inputs), targets)

    def metrics(self, model, batch):
        inputs, targets = batch
        return {"loss": nn.functional.cross_entropy(model(inputs), targets)}

    def train_data(self):
        return torch.utils.data.TensorDataset(torch.ones(4000, 8), torch.zeros(4000, dtype=torch.int64))

    def eval_data(self):
        return None
