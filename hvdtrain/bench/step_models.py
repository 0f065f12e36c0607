"""The models of ``hvdtrain bench step``, with a batch for each: random, and another one on each rank."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError
from hvdtrain.settings.wording import did_you_mean


def _perceptron(width: int, depth: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


OWN: Mapping[str, tuple[Callable[[], nn.Module], int, int]] = {
    "mlp": (lambda: _perceptron(1024, 8), 1024, 10),
    "small": (lambda: _perceptron(384, 3), 384, 10),
    "many": (lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(500))), 8, 8),
}
"""Models for CPUs: how to make one, inputs of a sample, and classes. "mlp" has 8.4 million parameters, "many" a thousand tensors."""
_CLASSES = 1000


def check_model_name(name: str) -> None:
    """See that there is such a model.

    Raises:
        ConfigError: There is none, or torchvision, which would have it, cannot be imported.
    """
    if name in OWN:
        return
    known = [*OWN, *_torchvision(name).list_models()]
    if name not in known:
        guess = did_you_mean(name, known) or ";"
        raise ConfigError(
            f"--model does not know {name!r}{guess} give {', '.join(OWN)}, or a classifier of torchvision such as resnet50"
        )


def model_and_batch(name: str, batch_size: int, image_size: int, rank: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, the same on every rank, and this rank's batch: inputs and classes.

    Args:
        name: Of `OWN`, or of a classifier in torchvision.
        batch_size: Samples.
        image_size: Height and width of the images of torchvision's models.
        rank: Which rank's batch.
    """
    torch.manual_seed(0)
    make, inputs, classes = OWN[name] if name in OWN else (lambda: _torchvision(name).get_model(name), 0, _CLASSES)
    model = make()
    shape = (inputs,) if inputs else (3, image_size, image_size)
    torch.manual_seed(1 + rank)
    return model, torch.randn(batch_size, *shape), torch.randint(0, classes, (batch_size,))


def gradient_bytes(name: str, item_bytes: int) -> int:
    """Bytes of a model's gradients."""
    model = OWN[name][0]() if name in OWN else _torchvision(name).get_model(name)
    return item_bytes * sum(parameter.numel() for parameter in model.parameters())


def _torchvision(name: str) -> Any:
    try:
        return importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:  # RuntimeError: one that belongs to another build of torch
        raise ConfigError(
            f"--model {name} is torchvision's, which cannot be imported ({error}); install it, or give {', '.join(OWN)}"
        ) from error
