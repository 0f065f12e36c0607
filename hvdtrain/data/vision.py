"""torchvision's data sets: MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100, and folders of images.

This module imports torchvision; `hvdtrain.data.named` imports it when one of these is asked for. torchvision reads the
files and knows where they are; checksums and downloading are ours (`hvdtrain.data.downloads`), because many ranks may ask at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets, transforms

from hvdtrain.data.downloads import Archive, fetch_and_unpack, is_intact, once_per_node
from hvdtrain.data.images import ImageArrays
from hvdtrain.errors import ConfigError, DataError

_EVALUATION_FOLDERS = ("val", "valid", "validation", "test")
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
# torchvision has MD5 sums, which tell damage and not malice; some of the usual places are plain http.
_SHA256 = {
    ("MNIST", "train-images-idx3-ubyte.gz"): "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ("MNIST", "train-labels-idx1-ubyte.gz"): "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ("MNIST", "t10k-images-idx3-ubyte.gz"): "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ("MNIST", "t10k-labels-idx1-ubyte.gz"): "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ("FashionMNIST", "train-images-idx3-ubyte.gz"): "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ("FashionMNIST", "train-labels-idx1-ubyte.gz"): "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ("FashionMNIST", "t10k-images-idx3-ubyte.gz"): "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ("FashionMNIST", "t10k-labels-idx1-ubyte.gz"): "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ("CIFAR10", "cifar-10-python.tar.gz"): "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ("CIFAR100", "cifar-100-python.tar.gz"): "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A published data set.

    Args:
        name: As in ``--data``.
        make: torchvision's class.
        archives: Its files, for a mirror or the usual places.
        mean: Of each channel over the training images, scaled to 0 to 1.
        std: Likewise.
    """

    name: str
    make: Callable[..., Any]
    archives: Callable[[str | None], list[Archive]]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _mnist_archives(cls: Any, mirror: str | None) -> list[Archive]:
    folder = f"{cls.__name__}/raw"
    return [
        Archive(
            name=f"{folder}/{name}",
            sha256=_SHA256[cls.__name__, name],
            urls=tuple(f"{place.rstrip('/')}/{name}" for place in ([mirror] if mirror else cls.mirrors)),
            contents=(f"{folder}/{name.removesuffix('.gz')}",),
        )
        for name, _ in cls.resources
    ]


def _cifar_archives(cls: Any, mirror: str | None) -> list[Archive]:
    names = [name for name, _ in (*cls.train_list, *cls.test_list)] + [cls.meta["filename"]]
    return [
        Archive(
            name=cls.filename,
            sha256=_SHA256[cls.__name__, cls.filename],
            urls=(f"{mirror.rstrip('/')}/{cls.filename}" if mirror else cls.url,),
            contents=tuple(f"{cls.base_folder}/{name}" for name in names),
        )
    ]


MNIST = Published(
    name="mnist",
    make=datasets.MNIST,
    archives=functools.partial(_mnist_archives, datasets.MNIST),
    mean=(0.1307,),
    std=(0.3081,),
)
FASHION_MNIST = Published(
    name="fashion-mnist",
    make=datasets.FashionMNIST,
    archives=functools.partial(_mnist_archives, datasets.FashionMNIST),
    mean=(0.2860,),
    std=(0.3530,),
)
CIFAR10 = Published(
    name="cifar10",
    make=datasets.CIFAR10,
    archives=functools.partial(_cifar_archives, datasets.CIFAR10),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Published(
    name="cifar100",
    make=datasets.CIFAR100,
    archives=functools.partial(_cifar_archives, datasets.CIFAR100),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def load_published(
    published: Published, *, folder: Path, download: bool, timeout_s: float, mirror: str | None, augment: bool
) -> tuple[ImageArrays, ImageArrays]:
    """Return a published data set's training and test part, downloaded first where that is needed and allowed.

    Args:
        published: Which.
        folder: Where the data sets are.
        download: Whether a missing one may be downloaded.
        timeout_s: Longest wait for another process that downloads it, in seconds.
        mirror: URL of a folder that holds the archives, instead of the usual places.
        augment: Whether to change training images at random, see `ImageArrays`.

    Raises:
        DataError: It is not there and cannot be downloaded, or it is damaged.
    """
    archives = published.archives(mirror)
    files = [folder / path for archive in archives for path in archive.contents]

    def is_there() -> bool:
        return all(file.is_file() for file in files)

    def get() -> None:
        if not download and not all(is_intact(folder / archive.name, archive.sha256) for archive in archives):
            raise DataError(_missing(published, archives, folder, "and downloading is switched off"))
        try:
            fetch_and_unpack(archives, folder)
        except DataError as error:
            raise DataError(_missing(published, archives, folder, f"and could not be had: {error}")) from error

    once_per_node(published.name, folder, is_there=is_there, get=get, timeout_s=timeout_s)
    try:
        train, test = (published.make(folder, train=train) for train in (True, False))
        return (
            ImageArrays(*_tensors(train), mean=published.mean, std=published.std, augment=augment),
            ImageArrays(*_tensors(test), mean=published.mean, std=published.std),
        )
    except Exception as error:  # whatever torchvision raises for damaged files: AssertionError, UnpicklingError, ...
        raise DataError(
            f"{published.name} in {files[0].parent.absolute()} cannot be read ({type(error).__name__}: {error}); "
            "delete that folder, and it will be downloaded again"
        ) from error


def _missing(published: Published, archives: list[Archive], folder: Path, why: str) -> str:
    names = ", ".join(Path(archive.name).name for archive in archives)
    place = (folder / archives[0].name).parent.absolute()
    source = published.archives(None)[0].urls[0].rpartition("/")[0]
    return (
        f"{published.name} is not in {folder.absolute()} {why}. Place {names} in {place} by hand (they are at "
        f"{source}/), or name a mirror that has them with --data.mirror URL"
    )


def _tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    """Images, uint8 (samples, channels, height, width), and labels, int64, of a torchvision data set in memory."""
    images = torch.as_tensor(dataset.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(dataset.targets, dtype=torch.int64)


def load_image_folder(
    directory: Path, *, size: int, augment: bool, eval_fraction: float
) -> tuple[Dataset[Any], Dataset[Any] | None, int]:
    """Return training data, evaluation data and the number of classes of a folder of images.

    ``DIR/train`` and ``DIR/val`` (or valid, validation, test) hold one folder of images a class. Without ``DIR/train``,
    DIR itself does, and of each class an evenly spaced part is for evaluation: the same part in every run.

    Args:
        directory: DIR.
        size: Height and width of the images that the model sees.
        augment: Whether training images are random crops, mirrored or not; otherwise they are treated as in evaluation,
            resized and cropped at the centre.
        eval_fraction: Part of each class for evaluation where there is no such folder; 0 for none.

    Raises:
        DataError: The folder has another form.
    """
    if size < 1:
        raise ConfigError(f"--data.size must be at least 1, got {size}")
    if not 0 <= eval_fraction < 1:
        raise ConfigError(f"--data.eval-fraction must be at least 0 and less than 1, got {eval_fraction}")
    directory = directory.expanduser()
    tail: list[Any] = [transforms.ToTensor(), transforms.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)]
    plain = transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), *tail])
    varied = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *tail])
    for_training = varied if augment else plain
    if not (directory / "train").is_dir():
        whole = _image_folder(directory, for_training)
        chosen = _evenly_spaced(whole.targets, eval_fraction)
        rest = sorted(set(range(len(whole))) - set(chosen))
        evaluation = Subset(_image_folder(directory, plain), chosen) if chosen else None
        return Subset(whole, rest), evaluation, len(whole.classes)
    train = _image_folder(directory / "train", for_training)
    found = next((directory / name for name in _EVALUATION_FOLDERS if (directory / name).is_dir()), None)
    if found is None:
        return train, None, len(train.classes)
    evaluation_folder = _image_folder(found, plain)
    if evaluation_folder.classes != train.classes:
        different = sorted(set(train.classes) ^ set(evaluation_folder.classes))
        raise DataError(
            f"{directory / 'train'} and {found} must hold the same classes; only one of them has {', '.join(different)}"
        )
    return train, evaluation_folder, len(train.classes)


def _image_folder(directory: Path, transform: Callable[[Any], Any]) -> Any:
    try:
        return datasets.ImageFolder(str(directory), transform)
    except OSError as error:  # FileNotFoundError also for a folder without classes, or a class without images
        raise DataError(
            f"imagefolder cannot use {directory.absolute()}: {error}. It must hold one folder of images for each "
            "class, as in DIR/train/cat/1.png and DIR/val/cat/2.png"
        ) from error


def _evenly_spaced(labels: list[int], fraction: float) -> list[int]:
    """Indices of a part of each class, evenly spaced in the order that the images have."""
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    chosen = []
    for indices in members.values():
        count = min(round(fraction * len(indices)), len(indices) - 1)
        chosen += [indices[(2 * part + 1) * len(indices) // (2 * count)] for part in range(count)]
    return sorted(chosen)
