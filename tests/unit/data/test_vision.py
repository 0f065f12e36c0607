"""torchvision's data sets on small files in their real formats."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

try:
    from torchvision import datasets
except Exception as error:  # not only ImportError: beside another build of torch it is a RuntimeError
    pytest.skip(f"torchvision cannot be imported: {error}", allow_module_level=True)

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from serving import Served, serve

from hvdtrain.data import vision
from hvdtrain.data.loader import make_loader
from hvdtrain.data.named import NamedData, load_data
from hvdtrain.data.partition import BatchPartition
from hvdtrain.data.samplers import PartitionSampler
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.settings.options import Component

TRAIN, TEST = 20, 10


def load(name: str, folder: Path, *, download: bool = True, **args: Any) -> NamedData:
    return load_data(Component(name, args), folder=folder, download=download, timeout_s=30)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def know(monkeypatch: pytest.MonkeyPatch, cls: Any, name: str, content: bytes) -> None:
    """Let an archive of a test take the place of the published one."""
    monkeypatch.setitem(vision._SHA256, (cls.__name__, name), hashlib.sha256(content).hexdigest())


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(tmp_path / "server") as served:
        yield served


# -- MNIST's format ---------------------------------------------------------------------------------------------------


def idx_images(images: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(">IIII", 0x00000803, *images.shape) + images.tobytes()


def idx_labels(labels: np.ndarray[Any, Any]) -> bytes:
    return struct.pack(">II", 0x00000801, len(labels)) + labels.tobytes()


def mnist_content() -> tuple[dict[str, bytes], dict[str, np.ndarray[Any, Any]]]:
    """The four files, and what is in them."""
    draw = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": draw.integers(0, 256, (TRAIN, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": draw.integers(0, 10, TRAIN, dtype=np.uint8),
        "t10k-images-idx3-ubyte": draw.integers(0, 256, (TEST, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": draw.integers(0, 10, TEST, dtype=np.uint8),
    }
    files = {name: (idx_images if array.ndim == 3 else idx_labels)(array) for name, array in arrays.items()}
    return files, arrays


@pytest.fixture
def mnist_archives(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The four archives. torchvision's checksums are those of the real files: here, those of ours take their place."""
    archives = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in mnist_content()[0].items()}
    for cls in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(cls, "resources", [(name, md5(content)) for name, content in archives.items()])
        for name, content in archives.items():
            know(monkeypatch, cls, name, content)
    return archives


def place(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "below", "mean", "std"),
    [("mnist", "MNIST", 0.1307, 0.3081), ("fashion-mnist", "FashionMNIST", 0.2860, 0.3530)],
)
def test_files_in_mnists_format_are_read_without_a_download(
    name: str, below: str, mean: float, std: float, tmp_path: Path
) -> None:
    files, arrays = mnist_content()
    place(files, tmp_path / below / "raw")
    for download in (True, False):
        data = load(name, tmp_path, download=download)
        assert (data.shape, data.classes, len(data.train), len(data.evaluation)) == ((1, 28, 28), 10, TRAIN, TEST)  # type: ignore[arg-type]
    for part, prefix in ((data.train, "train"), (data.evaluation, "t10k")):
        assert part is not None
        for index in (0, 7):
            image, label = part[index]
            raw = torch.from_numpy(arrays[f"{prefix}-images-idx3-ubyte"][index]).float() / 255
            torch.testing.assert_close(image, ((raw - mean) / std).unsqueeze(0))
            assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
            assert int(label) == arrays[f"{prefix}-labels-idx1-ubyte"][index]


@pytest.mark.parametrize(("name", "below"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_is_downloaded_from_a_mirror(
    name: str, below: str, mnist_archives: dict[str, bytes], server: Served, tmp_path: Path
) -> None:
    place(mnist_archives, server.folder)
    data = load(name, tmp_path, mirror=server.url + "/")
    assert server.requests == dict.fromkeys(mnist_archives, 1)
    assert len(data.train) == TRAIN  # type: ignore[arg-type]
    assert {path.name for path in (tmp_path / below / "raw").iterdir()} == set(mnist_content()[0])
    load(name, tmp_path, mirror=server.url)
    assert server.requests == dict.fromkeys(mnist_archives, 1)


def test_archives_placed_by_hand_need_no_download(mnist_archives: dict[str, bytes], tmp_path: Path) -> None:
    place(mnist_archives, tmp_path / "MNIST" / "raw")
    assert len(load("mnist", tmp_path, download=False).train) == TRAIN  # type: ignore[arg-type]


def test_a_failed_download_says_which_files_to_place_where(server: Served, tmp_path: Path) -> None:
    with pytest.raises(DataError) as told:
        load("mnist", tmp_path, mirror=server.url)
    for words in (
        f"mnist is not in {tmp_path}",
        f"{server.url}/train-images-idx3-ubyte.gz: HTTP Error 404",
        "Place train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, "
        f"t10k-labels-idx1-ubyte.gz in {tmp_path}/MNIST/raw by hand",
        "--data.mirror URL",
    ):
        assert words in str(told.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("mnist", "Place train-images-idx3-ubyte.gz"), ("cifar10", "Place cifar-10-python.tar.gz in {folder} by hand")],
)
def test_without_download_a_missing_data_set_says_what_to_do(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="downloading is switched off") as told:
        load(name, tmp_path, download=False)
    assert words.format(folder=tmp_path) in str(told.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    files, _ = mnist_content()
    raw = place(files, tmp_path / "MNIST" / "raw")
    (raw / "train-images-idx3-ubyte").write_bytes(files["train-images-idx3-ubyte"][:-100])
    with pytest.raises(DataError, match=f"mnist in {raw} cannot be read.*delete that folder"):
        load("mnist", tmp_path)


# -- CIFAR's format ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cifar:
    """A data set in CIFAR's format, its archive, and how many images it has."""

    make: type
    archive: bytes
    train: int
    evaluation: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def name(self) -> str:
        return self.make.__name__.lower()


CIFARS = [
    (datasets.CIFAR10, "labels", 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    (datasets.CIFAR100, "fine_labels", 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
]


@pytest.fixture(params=CIFARS, ids=["cifar10", "cifar100"])
def cifar(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cifar:
    """Batches of four images; the checksums of their archive take the place of the real ones, as above."""
    cls, labels, classes, mean, std = request.param
    draw = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    for name, _ in (*cls.train_list, *cls.test_list):
        batch = {
            "batch_label": name,
            labels: draw.integers(0, classes, 4).tolist(),
            "data": draw.integers(0, 256, (4, 3072), dtype=np.uint8),
            "filenames": [f"{name}_{number}.png" for number in range(4)],
        }
        files[name] = pickle.dumps(batch, protocol=2)
    files[cls.meta["filename"]] = pickle.dumps({cls.meta["key"]: [str(label) for label in range(classes)]})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{cls.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    train, test = ([[name, md5(files[name])] for name, _ in part] for part in (cls.train_list, cls.test_list))
    monkeypatch.setattr(cls, "train_list", train)
    monkeypatch.setattr(cls, "test_list", test)
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(files[cls.meta["filename"]])})
    know(monkeypatch, cls, cls.filename, buffer.getvalue())
    return Cifar(cls, buffer.getvalue(), 4 * len(train), 4 * len(test), classes, mean, std)


def test_cifar_is_downloaded_and_read(cifar: Cifar, server: Served, tmp_path: Path) -> None:
    (server.folder / cifar.make.filename).write_bytes(cifar.archive)
    data = load(cifar.name, tmp_path, mirror=server.url, augment=False)
    assert (data.shape, data.classes) == ((3, 32, 32), cifar.classes)
    assert (len(data.train), len(data.evaluation)) == (cifar.train, cifar.evaluation)  # type: ignore[arg-type]
    theirs = cifar.make(tmp_path, train=True)
    for index in (0, cifar.train - 1):
        image, label = data.train[index]
        raw = torch.from_numpy(np.array(theirs[index][0])).permute(2, 0, 1).float() / 255
        expected = (raw - torch.tensor(cifar.mean).view(3, 1, 1)) / torch.tensor(cifar.std).view(3, 1, 1)
        torch.testing.assert_close(image, expected)
        assert int(label) == theirs[index][1]
    load(cifar.name, tmp_path, mirror=server.url)
    assert server.requests == {cifar.make.filename: 1}


def test_only_cifars_training_images_vary(cifar: Cifar, tmp_path: Path) -> None:
    (tmp_path / cifar.make.filename).write_bytes(cifar.archive)
    data = load(cifar.name, tmp_path, download=False)
    assert data.evaluation is not None
    assert len({float(data.train[0][0].sum()) for _ in range(8)}) > 1
    assert len({float(data.evaluation[0][0].sum()) for _ in range(8)}) == 1


# -- folders of images ------------------------------------------------------------------------------------------------


def pictures(folder: Path, classes: dict[str, int]) -> Path:
    """PNG images of 20 x 16, brighter by class."""
    for level, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (20, 16), (60 * level + number, 10, 20)).save(folder / name / f"{number:02}.png")
    return folder


@pytest.mark.parametrize("evaluation", ["val", "valid", "validation", "test"])
def test_a_folder_with_train_and_evaluation_parts(evaluation: str, tmp_path: Path) -> None:
    pictures(tmp_path / "train", {"cat": 5, "dog": 3})
    pictures(tmp_path / evaluation, {"cat": 2, "dog": 2})
    data = load(f"imagefolder:{tmp_path}", tmp_path, size=12)
    assert (data.shape, data.classes, len(data.train), len(data.evaluation)) == ((3, 12, 12), 2, 8, 4)  # type: ignore[arg-type]
    image, label = data.train[7]
    assert (image.shape, image.dtype, label) == ((3, 12, 12), torch.float32, 1)


def test_training_images_are_cropped_at_random_and_evaluation_images_are_not(tmp_path: Path) -> None:
    draw = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.fromarray(draw).save(tmp_path / part / "cat" / "1.png")

    def seen(part: Any) -> int:
        return len({float(part[0][0].sum()) for _ in range(6)})

    varied, plain = (load(f"imagefolder:{tmp_path}", tmp_path, size=12, augment=augment) for augment in (True, False))
    assert (seen(varied.train), seen(varied.evaluation)) == (6, 1)
    assert (seen(plain.train), seen(plain.evaluation)) == (1, 1)
    assert plain.evaluation is not None
    assert torch.equal(plain.train[0][0], plain.evaluation[0][0])


def test_a_folder_without_an_evaluation_part_is_trained_on_alone(tmp_path: Path) -> None:
    pictures(tmp_path / "train", {"cat": 5, "dog": 3})
    data = load(f"imagefolder:{tmp_path}", tmp_path)
    assert (len(data.train), data.evaluation, data.shape) == (8, None, (3, 224, 224))  # type: ignore[arg-type]


def test_a_folder_of_classes_is_split_evenly_and_always_in_the_same_way(tmp_path: Path) -> None:
    pictures(tmp_path / "data", {"cat": 20, "dog": 10, "eel": 1})
    data = load(f"imagefolder:{tmp_path / 'data'}", tmp_path, size=8, augment=False, eval_fraction=0.2)
    again = load(f"imagefolder:{tmp_path / 'data'}", tmp_path, size=8, augment=False, eval_fraction=0.2)

    def samples(part: Any) -> list[tuple[float, int]]:
        return [(round(float(image[0].mean()), 4), label) for image, label in part]

    assert samples(data.evaluation) == samples(again.evaluation)
    assert [label for _, label in samples(data.evaluation)] == [0] * 4 + [1] * 2
    assert not set(samples(data.train)) & set(samples(data.evaluation))
    assert len(samples(data.train)) == 31 - 6
    assert data.classes == 3
    assert load(f"imagefolder:{tmp_path / 'data'}", tmp_path, eval_fraction=0).evaluation is None
    most = load(f"imagefolder:{tmp_path / 'data'}", tmp_path, size=8, eval_fraction=0.99)
    assert [label for _, label in samples(most.train)] == [0, 1, 2]


def test_images_load_in_loader_processes(tmp_path: Path) -> None:
    data = load(f"imagefolder:{pictures(tmp_path / 'data', {'cat': 6, 'dog': 6})}", tmp_path, size=8, eval_fraction=0)
    sampler = PartitionSampler(BatchPartition(length=12, global_batch_size=4), shuffle=True, seed=0)
    first, second = ([batch[0] for batch in make_loader(data.train, sampler, workers=1)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_folders_of_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot use .*nowhere.*one folder of images for each class"):
        load(f"imagefolder:{tmp_path / 'nowhere'}", tmp_path)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"cannot use .*empty"):
        load(f"imagefolder:{tmp_path / 'empty'}", tmp_path)
    pictures(tmp_path / "train", {"cat": 2, "dog": 2})
    pictures(tmp_path / "val", {"cat": 2, "fox": 2})
    with pytest.raises(DataError, match="only one of them has dog, fox"):
        load(f"imagefolder:{tmp_path}", tmp_path)


@pytest.mark.parametrize(("argument", "value"), [("size", 0), ("eval_fraction", 1.0), ("eval_fraction", -0.1)])
def test_arguments_out_of_bounds_are_refused(argument: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--data.{argument.replace('_', '-')} must be"):
        load(f"imagefolder:{tmp_path}", tmp_path, **{argument: value})


def test_every_published_archive_has_a_sha_256() -> None:
    for published in (vision.MNIST, vision.FASHION_MNIST, vision.CIFAR10):
        for archive in published.archives(None):
            assert len(archive.sha256) == 64
