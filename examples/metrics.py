"""Metrics of torchmetrics, callbacks and predictions: stop when the F-score gets no better, keep the best, predict with it.

python examples/metrics.py
torchrun --nproc-per-node 2 examples/metrics.py
cd examples && python -m hvdtrain --task metrics:Digits --epochs 20 --global-batch-size 60
"""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

import hvdtrain
from hvdtrain.data.digits import digits


class Digits:
    def __init__(self) -> None:
        scores = {"f1": MulticlassF1Score(10, average="macro"), "auroc": MulticlassAUROC(10)}
        self.epoch_metrics = {"digits": MetricCollection(scores)}

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def build_callbacks(self) -> list[Any]:
        return [hvdtrain.EarlyStopping("digits/f1", mode="max", patience=2), hvdtrain.ExponentialMovingAverage(0.9)]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(model(images), labels)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        outputs = model(images)
        self.epoch_metrics["digits"].update(outputs, labels)
        return {"loss": nn.functional.cross_entropy(outputs, labels)}

    def predict(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, _ = batch
        return {"digit": model(images).argmax(dim=1)}

    def train_data(self) -> Dataset[Any]:
        return digits(train=True)

    def eval_data(self) -> Dataset[Any]:
        return digits(train=False)


def main() -> None:
    torch.manual_seed(0)
    task = Digits()
    model = task.build_model().double()
    with hvdtrain.init() as backend, tempfile.TemporaryDirectory() as folder:
        model.to(backend.device)
        best = hvdtrain.BestCheckpoint(folder, "digits/f1", mode="max")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        callbacks = [*task.build_callbacks(), best]
        trainer = hvdtrain.Trainer(backend, model, optimizer, task=task, precision="fp64", callbacks=callbacks)
        trainer.fit(task.train_data(), task.eval_data(), epochs=20, global_batch_size=60)
        found = best.checkpoints.find(backend)  # to go no further, but have the best weights again
        result = trainer.fit(task.train_data(), task.eval_data(), epochs=0, global_batch_size=60, resume_from=found)
        outputs = trainer.predict(task.eval_data())
        if backend.rank == 0:
            right = (outputs["digit"] == task.eval_data().tensors[1]).double().mean()
            print(
                f"{backend.world_size} rank(s): f1 {result.eval_metrics['digits/f1']:.4f}, "
                f"auroc {result.eval_metrics['digits/auroc']:.4f} after {result.epochs} epochs; {right:.4f} are right"
            )


if __name__ == "__main__":
    main()
