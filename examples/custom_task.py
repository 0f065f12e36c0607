"""A task of your own: two targets, two losses, its own metrics.

python examples/custom_task.py
cd examples && python -m hvdtrain --task custom_task:Circle --task.samples 500 --epochs 20 --lr 0.01
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset


class Circle:
    """From an angle to the point on the unit circle."""

    def __init__(self, samples: int = 300) -> None:
        self.samples = samples

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 2))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        angle, point = batch
        return (model(angle) - point).square().sum(dim=1).mean()

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        angle, point = batch
        distance = (model(angle) - point).norm(dim=1)
        return {
            "loss": self.loss(model, batch),
            "distance": distance.mean(),
            "within_0.1": (distance < 0.1).double().mean(),
        }

    def train_data(self) -> Dataset:
        angle = torch.linspace(-math.pi, math.pi, self.samples).unsqueeze(1)
        return ArrayDataset(angle, torch.cat([angle.cos(), angle.sin()], dim=1))

    def eval_data(self) -> Dataset:
        return self.train_data()


def main() -> None:
    torch.manual_seed(0)
    task = Circle()
    with hvdtrain.init() as backend:
        model = task.build_model().to(backend.device)
        trainer = hvdtrain.Trainer(backend, model, torch.optim.Adam(model.parameters(), lr=0.02), task=task)
        result = trainer.fit(task.train_data(), task.eval_data(), epochs=40, global_batch_size=30)
        if backend.rank == 0:
            print({name: round(value, 4) for name, value in result.eval_metrics.items()})


if __name__ == "__main__":
    main()
