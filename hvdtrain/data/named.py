"""From a configured data set to data: a short name, or whatever is importable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from hvdtrain.components import resolve
from hvdtrain.data import digits as digits_module
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.options import Component


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedData:
    """Data for image classification.

    Attributes:
        train: Of (image, class index).
        evaluation: Likewise.
        shape: Of one image: channels, height, width.
        classes: How many.
    """

    train: Dataset[Any]
    evaluation: Dataset[Any] | None
    shape: tuple[int, ...]
    classes: int


def load_data(component: Component, *, folder: Path, download: bool, timeout_s: float) -> NamedData:
    """Load a data set.

    Raises:
        ConfigError: Unknown name or argument.
        DataError: It is not there and cannot be downloaded, or is damaged.
    """
    if component.name == "digits":
        return NamedData(
            train=digits_module.digits(True),
            evaluation=digits_module.digits(False),
            shape=digits_module.SHAPE,
            classes=digits_module.CLASSES,
        )
    raise ConfigError(component.name)
