"""Two small models for images, so that the main job needs nothing else."""

from __future__ import annotations

import math

from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.settings.wording import shown

_MOST = {"classes": 2**24, "channels": 2**16, "size": 2**16, "width": 2**14}
_MOST_LAYERS = 1000


def cnn(channels: int = 1, size: int = 8, classes: int = 10, width: int = 32) -> nn.Module:
    """Return a convolutional network for square images.

    Args:
        channels: Of the images.
        size: Height and width of the images, at least 4.
        classes: Outputs.
        width: Channels of the first layer; the second has twice as many.
    """
    _check(classes=classes, channels=channels, size=size, width=width)
    return nn.Sequential(
        *_block(channels, width),
        *_block(width, 2 * width),
        nn.MaxPool2d(2),
        *_block(2 * width, 2 * width),
        nn.AdaptiveMaxPool2d(2 if size < 16 else 4),
        nn.Flatten(),
        nn.Linear(2 * width * (4 if size < 16 else 16), classes),
    )


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    # Group and not batch normalisation: it looks at one sample at a time, so every world size computes the same.
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(max(1, outputs // 8), outputs), nn.ReLU()]


def mlp(channels: int = 1, size: int = 8, classes: int = 10, width: int = 128, depth: int = 2) -> nn.Module:
    """Return a perceptron with ``depth`` hidden layers of ``width`` units."""
    _check(classes=classes, channels=channels, size=size, width=width)
    if type(depth) is not int or not 0 <= depth <= _MOST_LAYERS:
        raise ConfigError(f"--model.depth must be a whole number from 0 to {_MOST_LAYERS}, got {shown(depth)}")
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = math.prod((channels, size, size))
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if type(value) is not int or not 1 <= value <= _MOST[name]:
            raise ConfigError(f"--model.{name} must be a whole number from 1 to {_MOST[name]}, got {shown(value)}")
