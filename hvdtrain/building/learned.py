"""What a run trains: the task, its model and its data, out of names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn

from hvdtrain.backends.base import Backend
from hvdtrain.data.named import NamedData, load_data
from hvdtrain.errors import ConfigError
from hvdtrain.settings.components import resolve
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.options import Component
from hvdtrain.training import models
from hvdtrain.training.dry_run import check_model
from hvdtrain.training.task import Classification, Task


def task_of(config: TrainConfig) -> Task:
    """The task that ``--task`` names, or classification of what ``--data`` names by what ``--model`` names."""
    if config.task is not None:
        task = resolve(config.task, flag="--task")()
        if not isinstance(task, Task):
            missing = [n for n in ("build_model", "loss", "metrics", "train_data", "eval_data") if not hasattr(task, n)]
            raise ConfigError(f"--task {config.task.name} is no hvdtrain.Task: it lacks {', '.join(missing)}")
        return task
    assert config.data is not None
    assert config.model is not None
    data = load_data(config.data, folder=Path(config.data_dir), download=config.download, timeout_s=config.timeout)
    return _NamedClassification(
        _model_maker(config.model, data), data.train, data.evaluation, label_smoothing=config.label_smoothing, data=data
    )


class _NamedClassification(Classification):
    """Of --model and --data, with what the data say of themselves."""

    def __init__(self, *parts: Any, data: NamedData, **more: Any) -> None:
        super().__init__(*parts, **more)
        self.data = data


def place_model(config: TrainConfig, task: Task, model: Any, backend: Backend) -> None:
    """Puts the model on its device, and sees that it is one, and takes the data."""
    if not isinstance(model, nn.Module):
        who = f"--model {config.model.name}" if config.model is not None else f"{type(task).__name__}.build_model"
        raise ConfigError(f"{who} made a {type(model).__name__}, not a torch.nn.Module")
    model.to(backend.device)
    if isinstance(task, _NamedClassification) and config.model is not None:
        check_model(model, task.data.shape, task.data.classes, name=config.model.name)


def _model_maker(component: Component, data: NamedData) -> Callable[[], nn.Module]:
    """A component's callable, with the data's shape filled in where the model asks for it and the user does not say."""
    own = {"cnn": models.cnn, "mlp": models.mlp}
    if component.name in own:
        build = resolve(component, where=(own,), flag="--model")
        if not data.shape or not data.classes:
            raise ConfigError(
                f"--model {component.name} needs images and classes, which --data does not say; name a model of your own by its "
                "import path, or return a NamedData with shape and classes"
            )
        fitting = {"channels": data.shape[0], "size": data.shape[-1], "classes": data.classes}
        return lambda: cast(nn.Module, build(**{k: v for k, v in fitting.items() if k not in build.kwargs}))
    build = resolve(component, where=(own, "torchvision.models"), flag="--model")
    torchvision = getattr(build.target, "__module__", "").startswith("torchvision.")
    extra = {"num_classes": data.classes} if torchvision and data.classes and "num_classes" not in build.kwargs else {}
    return lambda: cast(nn.Module, build(**extra))
