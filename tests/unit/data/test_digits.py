"""The digits inside the package: the right ones, split as documented, and learnable."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch

from hvdtrain.data import digits as module
from hvdtrain.data.digits import digits
from hvdtrain.errors import DataError


def test_the_split_is_1437_for_training_and_36_of_each_digit_for_testing() -> None:
    train, test = digits(True), digits(False)
    assert (len(train), len(test)) == (1437, 360)
    assert test.tensors[1].bincount().tolist() == [36] * 10
    assert train.tensors[1].bincount().tolist() == [142, 146, 141, 147, 145, 146, 145, 143, 138, 144]


def test_no_image_is_in_both_parts_and_none_is_missing() -> None:
    images, labels = module._read()
    assert images.shape == (1797, 8, 8)
    whole = sorted((*image.reshape(-1).tolist(), int(label)) for image, label in zip(images, labels, strict=True))
    parts = [
        (*(image * 16).to(torch.int64).reshape(-1).tolist(), int(label))
        for part in (digits(True), digits(False))
        for image, label in zip(*part.tensors, strict=True)
    ]
    assert sorted(parts) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_are_scaled_floats_and_labels_int64(dtype: torch.dtype) -> None:
    images, labels = digits(True, dtype).tensors
    assert (images.shape, images.dtype) == ((1437, 1, 8, 8), dtype)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert (labels.shape, labels.dtype) == ((1437,), torch.int64)


def test_the_split_and_the_images_never_change() -> None:
    # Accuracies are compared over the years: the split is fixed.
    def fingerprint(train: bool) -> str:
        images, labels = digits(train).tensors
        content = (images * 16).to(torch.uint8).numpy().tobytes() + labels.to(torch.uint8).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    assert (fingerprint(True), fingerprint(False)) == ("533f55b38a07a89a", "52377cefc1e52914")


def test_the_file_is_small_and_attributed() -> None:
    assert module._FILE.stat().st_size < 100_000
    attribution = module._FILE.with_name("ATTRIBUTION.md").read_text()
    for words in ("Alpaydin", "Kaynak", "10.24432/C50P49", "CC BY 4.0", "Changes"):
        assert words in attribution


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 not an archive", b"junk"])
def test_a_damaged_file_is_named(content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "digits.npz"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(module, "_FILE", file)
    with pytest.raises(DataError, match=f"{file}.*reinstall hvdtrain"):
        digits(True)


def test_a_truncated_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "digits.npz"
    content = bytearray(module._FILE.read_bytes())
    content[1000:1100] = bytes(100)
    file.write_bytes(content)
    monkeypatch.setattr(module, "_FILE", file)
    with pytest.raises(DataError, match="reinstall hvdtrain"):
        digits(True)


def test_a_linear_classifier_learns_them() -> None:
    torch.manual_seed(0)
    (x, y), (test_x, test_y) = digits(True).tensors, digits(False).tensors
    model = torch.nn.Linear(64, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x.flatten(1)), y).backward()
        optimizer.step()
    assert (model(test_x.flatten(1)).argmax(1) == test_y).double().mean() > 0.9


def test_they_need_no_scikit_learn() -> None:
    assert "sklearn" not in sys.modules
