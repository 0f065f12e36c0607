"""Image data sets that live in memory: 8-bit images normalised batch by batch, and synthetic ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError

_MIXER = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: neighbours in, strangers out
_MASK = 2**64 - 1


class ImageArrays(ArrayDataset):
    """8-bit images kept as they are, a quarter of the memory of float32, and normalised when they are loaded.

    Args:
        images: uint8, shape (samples, channels, height, width).
        labels: int64, shape (samples,).
        mean: Of each channel, for pixels scaled to 0 to 1.
        std: Likewise.
        augment: Shift each image by up to four pixels at random and mirror half of them, as is usual for CIFAR-10.
            The random numbers are torch's.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, *, mean: Sequence[float], std: Sequence[float], augment: bool = False
    ) -> None:
        super().__init__(images, labels)
        self._scale = (1 / 255 / torch.tensor(std)).view(1, -1, 1, 1)
        self._shift = (-torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1)
        self._augment = augment

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        images, labels = self.batch([range(len(self))[index]])
        return images[0], labels[0]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Return images, float32, shape (len(indices), channels, height, width), and labels, shape (len(indices),)."""
        images, labels = super().batch(indices)
        if self._augment:
            images = shifted_and_mirrored(images, by=4)
        return torch.addcmul(self._shift, images.float(), self._scale), labels


def shifted_and_mirrored(images: Tensor, *, by: int) -> Tensor:
    """Return each image shifted by -by to by pixels both ways, the gap filled with zeros, and mirrored or not.

    Args:
        images: Shape (samples, channels, height, width).
        by: Pixels.
    """
    samples, _, height, width = images.shape
    padded = functional.pad(images, (by, by, by, by))
    top, left = torch.randint(2 * by + 1, (2, samples, 1))
    mirrored = torch.rand(samples, 1) < 0.5
    columns = torch.arange(width).expand(samples, width)
    columns = left + torch.where(mirrored, columns.flip(1), columns)
    rows = top + torch.arange(height)
    sample = torch.arange(samples)
    # Indices around a slice put the indexed dimensions first: (samples, height, width, channels).
    return padded[sample[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


class Synthetic(Dataset[tuple[Tensor, int]]):
    """Noise with a class-dependent brightness: for timing, and to see that something learns. Nothing is stored.

    A sample is a window of one fixed stretch of noise, chosen by seed and index: as cheap as reading memory, and equal
    in every process.

    Args:
        samples: How many.
        shape: Of one sample.
        classes: Number of labels.
        seed: Other seeds give other samples.
    """

    def __init__(self, samples: int, shape: Sequence[int], classes: int, *, seed: int = 0) -> None:
        if samples < 1 or classes < 1 or not shape or min(shape) < 1:
            raise ConfigError(
                f"synthetic data needs at least 1 sample, 1 class and sizes of at least 1, got samples={samples}, "
                f"classes={classes}, shape={tuple(shape)}"
            )
        self.shape = tuple(shape)
        self.classes = classes
        self._samples = samples
        self._seed = seed
        self._numbers = torch.Size(self.shape).numel()
        self._noise = torch.randn(2 * self._numbers + 1021, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        mixed = (range(self._samples)[index] + 1 + (self._seed << 40)) * _MIXER & _MASK
        mixed = (mixed ^ mixed >> 29) * _MIXER & _MASK
        start, label = (mixed >> 20) % (len(self._noise) - self._numbers + 1), mixed % self.classes
        window = self._noise[start : start + self._numbers].view(self.shape)
        return window + (2 * label + 1 - self.classes) / self.classes, label
