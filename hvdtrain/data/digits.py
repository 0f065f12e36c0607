"""Real handwritten digits, inside the package: what the main job learns without a network.

The images are the test part of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (1998), UCI
Machine Learning Repository, https://doi.org/10.24432/C50P49, licensed CC BY 4.0: 1,797 images of 8 x 8 pixels by 13
people. ``ATTRIBUTION.md`` beside this file says where the copy comes from and what was changed.

The split into training and test part is ours, since the repository's own training part is not shipped: of each digit,
36 images evenly spaced in the order of the file are for testing (360), all others for training (1,437). The file holds
the people one after the other, so every writer is in both parts; a test on unseen writers would be harder.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import DataError

SHAPE = (1, 8, 8)
CLASSES = 10

_FILE = Path(__file__).with_name("digits.npz")
_TEST_PER_CLASS = 36
_LARGEST_PIXEL = 16


def digits(train: bool, dtype: torch.dtype = torch.float32) -> ArrayDataset:
    """Return the training part (1,437 images) or the test part (360).

    Args:
        train: Which part.
        dtype: Of the images, a floating-point type.

    Returns:
        Images, shape (samples, 1, 8, 8), from 0 (paper) to 1 (ink), and labels 0 to 9, int64, shape (samples,).

    Raises:
        DataError: The file in the package is missing or damaged.
    """
    images, labels = _read()
    chosen = _is_test(labels) != train
    return ArrayDataset(
        torch.from_numpy(images[chosen]).unsqueeze(1).to(dtype) / _LARGEST_PIXEL,
        torch.from_numpy(labels[chosen]).to(torch.int64),
    )


def _read() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images (1797, 8, 8) with pixels 0 to 16, and labels (1797,), in the order of the original file."""
    try:
        with _FILE.open("rb") as file, np.load(file, allow_pickle=False) as content:
            images, labels = content["images"], content["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"the digits inside the package cannot be read: {_FILE}: {error}; reinstall hvdtrain"
        ) from error
    return images, labels


def _is_test(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which images are for testing: of each class, a fixed number evenly spaced."""
    test = np.zeros(len(labels), dtype=np.bool_)
    for label in range(CLASSES):
        (members,) = np.nonzero(labels == label)
        middle_of_each = (2 * np.arange(_TEST_PER_CLASS) + 1) * len(members) // (2 * _TEST_PER_CLASS)
        test[members[middle_of_each]] = True
    return test
