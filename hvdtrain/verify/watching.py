"""A task that notes what is done with another one, and a callback that notes what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from hvdtrain.settings.components import resolve
from hvdtrain.settings.options import Component
from hvdtrain.verify.notes import (
    Call,
    Notes,
    Step,
    all_random_digest,
    numbers,
    part_digests,
    random_digest,
    sample_digests,
    sample_shapes,
)

if TYPE_CHECKING:
    from hvdtrain.training.events import StepEvent
    from hvdtrain.training.trainer import Trainer


class Watched:
    """Does as the task that it is given, and notes it.

    Args:
        name: Import path of the task.
        args: Its arguments.
        folder: Where the notes go.
        rank: Of this process.
        world_size: Of how many.
    """

    def __init__(self, name: str, args: Mapping[str, Any], folder: str, rank: int, world_size: int) -> None:
        self.notes = Notes(rank=rank, world_size=world_size)
        self._random = ""
        self.calls: list[Call] = []
        self.folder = Path(folder)
        self._task: Any = resolve(Component(name, args), flag="--task")()
        self.notes.summed = getattr(self._task, "loss_reduction", "mean") == "sum"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_task":
            raise AttributeError(name)
        return getattr(self._task, name)

    def build_model(self) -> nn.Module:
        """Return the task's model, without the randomness that no two runs share."""
        model: nn.Module = self._task.build_model()
        notes = self.notes
        notes.initial = numbers([*model.named_parameters(), *model.named_buffers()])
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                notes.norms.append(name)
            if isinstance(module, _DropoutNd) and module.p > 0:
                notes.dropouts.append(name)
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0:
                notes.dropouts.append(name)
                module.dropout = 0.0
        return model

    def train_data(self) -> Any:
        """Return the task's data."""
        return self._task.train_data()

    def eval_data(self) -> None:
        """Return None: nothing is evaluated here."""

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        """Return the task's metrics."""
        return self._task.metrics(model, batch)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the task's loss, and note what it was given and what it did."""
        samples, before, shapes = sample_digests(batch), part_digests(batch), sample_shapes(batch)
        weight, drawn = self._weight(batch, samples), all_random_digest()
        loss: Tensor = self._task.loss(model, batch)
        after, drawn_after = part_digests(batch), all_random_digest()
        changed = [path for path, digest in before.items() if after.get(path, digest) != digest]
        call = Call(
            samples=samples,
            loss=float(loss.detach()),
            # Samples that were stacked are copies; a collate function of the task's own may hand out the data set's.
            changed=changed if samples is None and hasattr(self._task, "collate") else [],
            random=random_digest(),
            weight=weight,
            shapes=shapes,
            data_drew=bool(self._random) and drawn != self._random,
            loss_drew=drawn != drawn_after,
        )
        self._random = drawn_after
        self.calls.append(call)
        return loss

    def _weight(self, batch: Any, samples: list[str] | None) -> float | None:
        """What the loss is a mean over."""
        for name in ("weight_of", "samples_of"):
            if hasattr(self._task, name):
                return float(getattr(self._task, name)(batch))
        return None if samples is None else float(len(samples))

    def build_callbacks(self) -> list[Any]:
        """Return the task's callbacks and the one that notes steps."""
        own: list[Any] = getattr(self._task, "build_callbacks", list)()
        return [*own, Steps(self)]


class Steps:
    """Notes each step.

    Args:
        watched: Has the notes.
    """

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._gradients: dict[str, Tensor] = {}

    def on_start(self, trainer: Trainer) -> None:
        """Training begins: what was called before was a rehearsal."""
        self._watched.calls.clear()
        module = trainer.replica.module
        assert trainer.replica.optimizer is not None

        def before_step(*_: Any) -> None:
            self._gradients = numbers((n, p.grad) for n, p in module.named_parameters() if p.grad is not None)

        trainer.replica.optimizer.register_step_pre_hook(before_step)

    def on_step(self, trainer: Trainer, event: StepEvent) -> None:
        """A step was made."""
        module, watched = trainer.replica.module, self._watched
        step = Step(
            calls=list(watched.calls),
            gradients=self._gradients,
            buffers=numbers(module.named_buffers()),
            parameters=numbers(module.named_parameters()),
        )
        watched.notes.steps.append(step)
        watched.calls.clear()
        watched.notes.write(watched.folder)
