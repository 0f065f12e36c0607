"""From a configured data set to data: a short name with its arguments, or whatever is importable.

torchvision is imported only when one of its data sets is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import Dataset

from hvdtrain.data import digits as digits_module
from hvdtrain.data.downloads import one_at_a_time
from hvdtrain.data.images import Synthetic
from hvdtrain.errors import ConfigError, DataError, HvdtrainError
from hvdtrain.settings.components import Resolved, described, resolve
from hvdtrain.settings.options import Component
from hvdtrain.settings.wording import shown

_IMAGE_FOLDER = "imagefolder:"
_MOST_SYNTHETIC = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedData:
    """Data for image classification.

    Attributes:
        train: Of (image, class index).
        evaluation: Likewise, or None.
        shape: Of one image: channels, height, width; () where it could not be found out.
        classes: How many; 0 where it could not be found out.
    """

    train: Dataset[Any]
    evaluation: Dataset[Any] | None
    shape: tuple[int, ...]
    classes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where data sets are, and how they may get there.

    Attributes:
        folder: Holds downloaded data sets.
        download: Whether a missing one may be downloaded.
        timeout_s: Longest wait for another process that downloads it, in seconds.
    """

    folder: Path
    download: bool
    timeout_s: float


def load_data(component: Component, *, folder: Path, download: bool, timeout_s: float) -> NamedData:
    """Load a data set; any number of ranks of a node may call this at once, and one of them downloads.

    Args:
        component: ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100``, ``imagefolder:DIR`` or ``synthetic`` with the
            arguments of the function of that name below; or an import path. What that names may return a `NamedData`,
            a pair of data sets (training, evaluation), or one data set; where it takes an argument ``train`` that is
            not given, it is called for both parts, as suits torchvision's classes.
        folder: Holds downloaded data sets.
        download: Whether a missing one may be downloaded.
        timeout_s: Longest wait for another process of this node that downloads it, in seconds.

    Raises:
        ConfigError: Unknown name or argument, or torchvision is needed and missing or broken.
        DataError: It is not there and cannot be downloaded, or is damaged.
    """
    place = Place(folder=folder, download=download, timeout_s=timeout_s)
    if component.name.startswith(_IMAGE_FOLDER):  # before import paths, which "imagefolder:DIR" looks like
        directory = component.name.removeprefix(_IMAGE_FOLDER)
        component = Component("imagefolder", {**component.args, "directory": directory})
    elif component.is_path:
        provided = () if "train" in component.args else ("train",)
        return _load_imported(resolve(component, flag="--data", provided=provided), place)
    found: NamedData = resolve(component, where=(_NAMES,), flag="--data", provided=("place",))(place=place)
    return found


def digits(place: Place) -> NamedData:
    """Handwritten digits, 8 x 8, from inside the package (see `hvdtrain.data.digits`)."""
    return NamedData(
        train=digits_module.digits(True),
        evaluation=digits_module.digits(False),
        shape=digits_module.SHAPE,
        classes=digits_module.CLASSES,
    )


def mnist(place: Place, mirror: str | None = None) -> NamedData:
    """MNIST, 28 x 28; ``mirror`` is the URL of a folder that holds its four archives."""
    return _published("MNIST", place, mirror, augment=False)


def fashion_mnist(place: Place, mirror: str | None = None) -> NamedData:
    """Fashion-MNIST, 28 x 28; ``mirror`` is the URL of a folder that holds its four archives."""
    return _published("FASHION_MNIST", place, mirror, augment=False)


def cifar10(place: Place, mirror: str | None = None, augment: bool = True) -> NamedData:
    """CIFAR-10, 3 x 32 x 32, training images shifted and mirrored at random; ``mirror`` holds its archive."""
    return _published("CIFAR10", place, mirror, augment=augment)


def cifar100(place: Place, mirror: str | None = None, augment: bool = True) -> NamedData:
    """CIFAR-100, as `cifar10`, with 100 classes."""
    return _published("CIFAR100", place, mirror, augment=augment, classes=100)


def imagefolder(
    place: Place, directory: str, size: int = 224, augment: bool = True, eval_fraction: float = 0.1
) -> NamedData:
    """Folders of images, one a class; see `hvdtrain.data.vision.load_image_folder` for the layout and arguments."""
    vision = _vision("imagefolder")
    train, evaluation, classes = vision.load_image_folder(
        Path(directory), size=int(size), augment=augment, eval_fraction=float(eval_fraction)
    )
    return NamedData(train=train, evaluation=evaluation, shape=(3, int(size), int(size)), classes=classes)


def synthetic(
    place: Place,
    *,
    samples: int = 1280,
    eval_samples: int = 256,
    shape: Sequence[int] | str = (3, 224, 224),
    classes: int = 1000,
    seed: int = 0,
) -> NamedData:
    """Noise of any shape, made on the spot, for timing (see `hvdtrain.data.images.Synthetic`)."""
    sizes = _sizes(shape)
    most = {"samples": samples, "eval_samples": eval_samples, "classes": classes, "shape": math.prod(sizes)}
    for what, number in most.items():
        if not isinstance(number, int | float) or number > _MOST_SYNTHETIC:
            raise ConfigError(
                f"--data.{what.replace('_', '-')} must be a number up to {_MOST_SYNTHETIC:,}, got {shown(number)}"
            )
    train = Synthetic(int(samples), sizes, int(classes), seed=2 * int(seed))
    evaluation = Synthetic(int(eval_samples), sizes, int(classes), seed=2 * int(seed) + 1)
    return NamedData(train=train, evaluation=evaluation, shape=sizes, classes=int(classes))


_NAMES: dict[str, Callable[..., NamedData]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagefolder": imagefolder,
    "synthetic": synthetic,
}


def _published(name: str, place: Place, mirror: str | None, *, augment: bool, classes: int = 10) -> NamedData:
    vision = _vision(name.lower().replace("_", "-"))
    train, evaluation = vision.load_published(
        getattr(vision, name),
        folder=place.folder,
        download=place.download,
        timeout_s=place.timeout_s,
        mirror=mirror,
        augment=augment,
    )
    return NamedData(train=train, evaluation=evaluation, shape=tuple(train.tensors[0].shape[1:]), classes=classes)


def _vision(name: str) -> ModuleType:
    try:
        return importlib.import_module("hvdtrain.data.vision")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--data {name} needs torchvision ({error}); pip install 'hvdtrain[vision]'. Without it there are digits "
            "and synthetic"
        ) from error
    except Exception as error:  # "RuntimeError: operator torchvision::nms does not exist", ImportError, OSError
        raise ConfigError(
            f"--data {name} needs torchvision, whose import fails ({type(error).__name__}: {error}): it was built for "
            f"another torch than the {torch.__version__} installed here. Install the two from the same index, as in "
            "pip install --force-reinstall torch torchvision. Without it there are digits and synthetic"
        ) from error


def _sizes(shape: Sequence[int] | str) -> tuple[int, ...]:
    """(3, 32, 32) from itself, "3x32x32" or "3,32,32"."""
    parts: Sequence[Any] = shape.replace("x", ",").strip("[]() ").split(",") if isinstance(shape, str) else shape
    try:
        return tuple(int(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--data.shape must be like 3x224x224, got {shown(shape)}") from error


def _load_imported(found: Resolved, place: Place) -> NamedData:
    """Data from an import path; where it may download, the ranks of a node take turns."""
    taking_turns = (
        one_at_a_time(found.path, place.folder, place.timeout_s)
        if found.kwargs.get("download")
        else contextlib.nullcontext()
    )
    with taking_turns:
        made = _make(found)
    if isinstance(made, NamedData):
        return made
    train, evaluation = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    for dataset in (train,) if evaluation is None else (train, evaluation):
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise ConfigError(
                f"--data {found.path} made a {type(dataset).__name__}, which is no data set; it must return one data "
                "set with __len__ and __getitem__, a pair of them (training, evaluation), or a NamedData"
            )
    try:
        samples, shape, classes = len(train), _shape_of(train), _classes_of(train)
    except HvdtrainError:
        raise
    except Exception as error:
        raise DataError(
            f"--data {found.path} made a {type(train).__name__} that has no first sample: {described(error)}"
        ) from error
    if samples == 0:
        raise DataError(f"--data {found.path} made a data set without samples")
    return NamedData(train=train, evaluation=evaluation, shape=shape, classes=classes)


def _make(found: Resolved) -> Any:
    parameters = _parameters(found)
    arguments: dict[str, Any] = {}
    if (found.target.__module__ or "").startswith("torchvision.") and "transform" in parameters - set(found.kwargs):
        arguments["transform"] = importlib.import_module("torchvision.transforms").ToTensor()
    try:
        if "train" in parameters - set(found.kwargs):
            return found(train=True, **arguments), found(train=False, **arguments)
        return found(**arguments)
    except ConfigError as error:
        if isinstance(error.__cause__, RuntimeError | OSError):  # torchvision's RuntimeError: Dataset not found
            raise DataError(f"--data {found.path} failed: {described(error.__cause__)}") from error
        raise


def _parameters(found: Resolved) -> set[str]:
    try:
        return set(inspect.signature(found.target).parameters)
    except (TypeError, ValueError):  # a builtin that does not tell
        return set()


def _shape_of(dataset: Any) -> tuple[int, ...]:
    if len(dataset) == 0:
        return ()
    sample = dataset[0]
    first = sample[0] if isinstance(sample, tuple | list) and sample else sample
    return tuple(getattr(first, "shape", ()))


def _classes_of(dataset: Any) -> int:
    names = getattr(dataset, "classes", None)
    if len(dataset) == 0:
        return 0
    if isinstance(names, int):
        return names
    if isinstance(names, Sequence):
        return len(names)
    tensors: Sequence[Any] = getattr(dataset, "tensors", ())
    labels = getattr(dataset, "targets", tensors[1] if len(tensors) > 1 else None)
    if labels is None:
        return 0
    labels = torch.as_tensor(labels)
    return int(labels.max()) + 1 if labels.dim() == 1 and not labels.is_floating_point() else 0
