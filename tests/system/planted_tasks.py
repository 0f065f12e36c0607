"""A task, and the same task with one thing wrong each."""

import os
import random

import torch
from torch import nn

import hvdtrain


def rank() -> int:
    """The rank, as a script would look it up."""
    return int(os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("HOROVOD_RANK") or 0)


class Data(torch.utils.data.Dataset):
    def __init__(self, length=48):
        self.x = torch.sin(torch.arange(length * 6.0)).reshape(length, 6)
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x)


class Sound:
    def build_model(self):
        return Net()

    def train_data(self):
        return Data()

    def eval_data(self):
        return Data(8)

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch)}


class RankedStart(Sound):
    def build_model(self):
        torch.manual_seed(7 + rank())
        return Net()


class Unseeded(Sound):
    def train_data(self):
        data = Data()
        order = list(range(len(data)))
        random.SystemRandom().shuffle(order)
        return torch.utils.data.Subset(data, order)


class OwnBuffer(Sound):
    def build_model(self):
        class Counting(Net):
            def __init__(self):
                super().__init__()
                self.register_buffer("mean", torch.zeros(6))

            def forward(self, x):
                self.mean.lerp_(x.detach().mean(0), 0.1)
                return super().forward(x)

        return Counting()


class SumOverRanks(Sound):
    def loss(self, model, batch):
        world = int(
            os.environ.get("WORLD_SIZE")
            or os.environ.get("OMPI_COMM_WORLD_SIZE")
            or os.environ.get("HOROVOD_SIZE")
            or 1
        )
        return super().loss(model, batch) * world


class SumOverSamples(Sound):
    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


class AlikeDropout(Sound):
    def loss(self, model, batch):
        torch.manual_seed(3)
        return super().loss(model, batch)


class InPlace(Sound):
    """Its batches are lists of the data set's own samples."""

    def collate(self, samples):
        return [(x, y) for x, y in samples]

    def samples_of(self, batch):
        return len(batch)

    def loss(self, model, batch):
        for x, _ in batch:
            x.mul_(0.5)
        return super().loss(model, (torch.stack([x for x, _ in batch]), torch.stack([y for _, y in batch])))


class Augmented(Sound):
    """Sound, and random in all ways: samples, a loss with noise, a batch that is changed, which is a copy."""

    def train_data(self):
        data = Data()
        data.x = data.x.double()
        return _Noisy(data)

    def loss(self, model, batch):
        batch[0].add_(0.1 * torch.randn_like(batch[0]))
        return super().loss(model, batch)


class _Noisy(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + random.random() * torch.rand(6, dtype=x.dtype), y


class OwnNorm(Sound):
    def build_model(self):
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


class AcrossSamples(Sound):
    def loss(self, model, batch):
        outputs = model(batch[0])
        return (outputs @ outputs.T).logsumexp(1).mean()


class Failing(Sound):
    def loss(self, model, batch):
        raise ValueError("planted in the task")


assert hvdtrain.Trainer
