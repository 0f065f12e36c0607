"""Images in memory and synthetic ones."""

from __future__ import annotations

import pytest
import torch

from hvdtrain.data.images import ImageArrays, Synthetic, shifted_and_mirrored
from hvdtrain.data.loader import make_loader
from hvdtrain.data.partition import BatchPartition
from hvdtrain.data.samplers import PartitionSampler
from hvdtrain.errors import ConfigError


def arrays(augment: bool = False) -> ImageArrays:
    images = torch.randint(256, (23, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageArrays(images, torch.arange(23), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0), augment=augment)


def test_images_are_scaled_and_normalised_by_channel() -> None:
    data = arrays()
    images, labels = data.batch([5, 2])
    raw = data.tensors[0][[5, 2]].double() / 255
    expected = (raw - torch.tensor([0.5, 0.25, 0]).view(1, 3, 1, 1)) / torch.tensor([0.5, 0.25, 2]).view(1, 3, 1, 1)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-6)
    assert images.dtype == torch.float32
    assert labels.tolist() == [5, 2]


def test_one_image_is_as_in_a_batch() -> None:
    data = arrays()
    image, label = data[22]
    assert torch.equal(image, data.batch([22])[0][0])
    assert int(label) == int(data[-1][1]) == 22
    with pytest.raises(IndexError):
        data[23]


@pytest.mark.parametrize("workers", [0, 1])
def test_they_are_loaded_as_whole_batches(workers: int) -> None:
    data = arrays()
    sampler = PartitionSampler(BatchPartition(length=23, global_batch_size=6), shuffle=True, seed=0)
    for indices, (images, labels) in zip(sampler, make_loader(data, sampler, workers=workers), strict=True):
        assert torch.equal(images, data.batch(indices)[0])
        assert labels.tolist() == indices


def test_augmented_images_are_shifted_and_half_of_them_mirrored() -> None:
    torch.manual_seed(0)
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    found = shifted_and_mirrored(image.expand(400, 2, 5, 5), by=1)
    assert (found.shape, found.dtype) == ((400, 2, 5, 5), torch.uint8)
    assert torch.equal(found[:, 0], found[:, 1])
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))[0, 0]
    windows = [padded[top : top + 5, left : left + 5] for top in range(3) for left in range(3)]
    possible = {tuple(window.flip(1).flatten().tolist()): True for window in windows}
    possible.update({tuple(window.flatten().tolist()): False for window in windows})
    mirrored = [possible[tuple(one.flatten().tolist())] for one in found[:, 0]]
    assert 150 < sum(mirrored) < 250
    assert {tuple(one.flatten().tolist()) for one in found[:, 0]} == set(possible)


def test_augmentation_leaves_the_stored_images_alone_and_differs_each_time() -> None:
    data = arrays(augment=True)
    before = data.tensors[0].clone()
    first, second = data.batch(range(23))[0], data.batch(range(23))[0]
    assert not torch.equal(first, second)
    assert torch.equal(data.tensors[0], before)


def test_synthetic_samples_depend_on_seed_and_index_alone() -> None:
    torch.manual_seed(1)
    first = Synthetic(100, (3, 16, 16), 10, seed=4)
    torch.manual_seed(2)
    again, other = Synthetic(100, (3, 16, 16), 10, seed=4), Synthetic(100, (3, 16, 16), 10, seed=5)
    for index in (0, 1, 99):
        assert torch.equal(first[index][0], again[index][0])
        assert first[index][1] == again[index][1]
        assert not torch.equal(first[index][0], other[index][0])
    assert len({float(first[index][0].sum()) for index in range(100)}) > 90


def test_synthetic_classes_are_all_there_and_can_be_told_apart() -> None:
    data = Synthetic(2000, (1, 16, 16), 4)
    brightness: dict[int, list[float]] = {label: [] for label in range(4)}
    for index in range(len(data)):
        image, label = data[index]
        brightness[label].append(float(image.mean()))
    assert all(400 < len(found) < 600 for found in brightness.values())
    means = [sum(found) / len(found) for found in brightness.values()]
    assert means == sorted(means)
    assert means[3] - means[0] > 1


def test_a_synthetic_index_out_of_bounds_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        Synthetic(4, (1,), 2)[4]


@pytest.mark.parametrize(("samples", "shape", "classes"), [(0, (1,), 1), (1, (), 1), (1, (0, 2), 1), (1, (1,), 0)])
def test_synthetic_data_of_nothing_is_refused(samples: int, shape: tuple[int, ...], classes: int) -> None:
    with pytest.raises(ConfigError, match=f"got samples={samples}, classes={classes}"):
        Synthetic(samples, shape, classes)
