"""What is trained: a model, its loss, its metrics and its data, as one small protocol that users bring.

The loop never looks into a batch. A task written for one process is right for any number of ranks, because everything
that it returns is a mean over the samples of the batch it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


@runtime_checkable
class Learning(Protocol):
    """The part of a task that the loop calls.

    A task may also have:

    - ``collate(samples)``, which makes a batch out of a list of samples as `torch.utils.data.DataLoader` wants it;
    - ``samples_of(batch)``, how many samples a batch has, where that is not the number of indices that it was made of: a
      ``collate`` that leaves broken ones out, or makes several of one;
    - ``weight_of(batch)``, what the batch's loss and metrics are means over if not over its samples: the number of tokens,
      of pairs, a sum of weights; a number from 0, or a tensor without dimensions (on a GPU it is waited for). A batch of
      weight 0 counts nothing, whatever its loss is;
    - ``loss_reduction = "sum"``: the loss is a sum over the batch, and a step's gradient is that of the sum over the global
      batch. Metrics stay means;
    - ``epoch_metrics``, a dictionary of metrics over the whole data set that are no means: objects of torchmetrics, or of your
      own (`hvdtrain.training.metric_state.EpochMetric`). `metrics` updates them with each batch; `Trainer` resets them before
      an evaluation, puts together what the ranks gathered, and reports what they compute;
    - ``predict(model, batch)``, the outputs of a batch for `Trainer.predict`.
    """

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss to minimise: a scalar, the mean over the batch's samples (or what the task says instead)."""
        ...

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor | float]:
        """Return what evaluation reports, each a mean as the loss is: numbers, or tensors without dimensions.

        A mean over something else comes with that, as ``(mean, weight)``.

        "loss" must be among them, and the names the same for every batch. Called without gradients, in evaluation mode.
        """
        ...


@runtime_checkable
class Task(Learning, Protocol):
    """Everything that the command line needs to train: ``--task package.module:MyTask`` names a class of this shape.

    It may also have ``build_optimizer(model)``, which returns the optimizer, instead of --optimizer and --lr, and
    ``build_callbacks()``, which returns a list of callbacks (`hvdtrain.Callback`).
    """

    def build_model(self) -> nn.Module:
        """Return a new model, on the CPU, in float32; called once on each rank, under the same seed."""
        ...

    def train_data(self) -> Dataset[Any]:
        """Return the training data: ``__len__`` and ``__getitem__``."""
        ...

    def eval_data(self) -> Dataset[Any] | None:
        """Return the evaluation data, or None."""
        ...


MANY_CLASSES = 50
"""From so many on, as in CIFAR-100 and ImageNet, top-5 accuracy is reported too."""


class Supervised:
    """Inputs and targets: a batch is ``(x, y)``.

    Args:
        loss: ``loss(model(x), y)``, a mean over the samples.

    Where the outputs are (samples, classes) and the targets class indices (samples,), evaluation reports the accuracy; of
    `MANY_CLASSES` or more also how often the right class is among the five likeliest.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor]) -> None:
        self._loss = loss

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        return self._loss(model(inputs), targets)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return loss and, for classification, accuracy."""
        inputs, targets = batch
        outputs = model(inputs)
        found = {"loss": self._loss(outputs, targets)}
        if _is_classification(outputs, targets):
            found["accuracy"] = (outputs.argmax(dim=1) == targets).double().mean()
            if outputs.shape[1] >= MANY_CLASSES:
                likeliest = outputs.topk(5, dim=1).indices
                found["accuracy_top5"] = (likeliest == targets.unsqueeze(1)).any(dim=1).double().mean()
        return found


class Classification(Supervised):
    """Image classification as a whole `Task`: cross-entropy of a model on two data sets.

    Args:
        model: Makes the model.
        train: Training data of ``(image, class index)``.
        evaluation: Evaluation data of the same form, or None.
        label_smoothing: In training only; evaluation reports the plain cross-entropy.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        train: Dataset[Any],
        evaluation: Dataset[Any] | None,
        *,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(nn.functional.cross_entropy)
        self._model, self._train, self._evaluation = model, train, evaluation
        self._label_smoothing = label_smoothing

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the cross-entropy of a batch, smoothed."""
        inputs, targets = batch
        return nn.functional.cross_entropy(model(inputs), targets, label_smoothing=self._label_smoothing)

    def build_model(self) -> nn.Module:
        """Return a new model."""
        return self._model()

    def train_data(self) -> Dataset[Any]:
        """Return the training data."""
        return self._train

    def eval_data(self) -> Dataset[Any] | None:
        """Return the evaluation data."""
        return self._evaluation


def _is_classification(outputs: Any, targets: Any) -> bool:
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.dim() == 2
        and targets.dim() == 1
        and targets.dtype == torch.int64
    )
