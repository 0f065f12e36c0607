"""Every recipe trains for a few steps, on two ranks and generated data of the right format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import ROOT, run, torchrun
from PIL import Image

RECIPES = ROOT / "examples" / "recipes"


def text(folder: Path) -> list[str]:
    (folder / "book.txt").write_text((ROOT / "README.md").read_text())
    return []


def folders_of_images(folder: Path) -> list[str]:
    for part, images in (("train", 16), ("val", 4)):
        for level, name in enumerate(("cat", "dog")):
            (folder / "imagenet" / part / name).mkdir(parents=True)
            for number in range(images):
                image = Image.new("RGB", (64, 48), (100 * level + number, 10, 20))
                image.save(folder / "imagenet" / part / name / f"{number}.JPEG")
    return ["--data", "imagefolder:imagenet", "--data.size", "64", "--batch-size", "4"]


def idx_files(folder: Path) -> list[str]:
    from mnist_files import write_digits

    write_digits(folder / "data")
    return ["--no-download"]


def noise(folder: Path) -> list[str]:
    """Of CIFAR-10's shape: its own files are known by their checksums."""
    return ["--data", "synthetic", "--data.shape", "3,32,32", "--data.classes", "10", "--data.samples", "256"]


DATA = {"mnist": idx_files, "cifar10": noise, "imagenet_resnet50": folders_of_images, "byte_lm": text}


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("mnist", "cifar10") else name for name in sorted(DATA)],
)
def test_a_recipe_trains(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if recipe != "byte_lm":
        pytest.importorskip("torchvision", reason="needs torchvision", exc_type=(ImportError, RuntimeError))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    torch.manual_seed(0)
    flags = DATA[recipe](tmp_path)
    steps = ["--max-steps", "2", "--warmup-epochs", "0", "--run-dir", "run"]
    if recipe == "byte_lm":
        steps[2:4] = ["--warmup-steps", "1"]
    argv = torchrun(2, "-m", "hvdtrain", "--config", str(RECIPES / f"{recipe}.yaml"), *flags, *steps)
    ended = run(argv, cwd=tmp_path)
    assert ended.code == 0, ended.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["world_size"]) == (2, 2)
    assert summary["eval_loss"] > 0  # finite, or it would be null


def test_every_recipe_is_run_here() -> None:
    assert {file.stem for file in RECIPES.glob("*.yaml")} == set(DATA)
