"""Parts that do not fit together, or are none, are refused by one sentence before training starts."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from hvdtrain.cli.commands import main
from hvdtrain.errors import ConfigError
from hvdtrain.training.dry_run import check_model

ODD = {
    "--model builtins.print": "made a NoneType, not a torch.nn.Module",
    "--model builtins.dict": "made a dict, not a torch.nn.Module",
    "--model sys.exit": "failed: SystemExit",
    "--model torch.nn.Linear --model.in_features 3 --model.out_features 2": "does not fit --data, whose images are 1 x 8 x 8",
    "--model.width 0": "--model.width must be a whole number from 1",
    "--model.width -1": "--model.width must be a whole number from 1",
    "--model.width 1.5": "--model.width must be a whole number from 1",
    "--model.width 1e30": "--model.width must be a whole number from 1",
    "--model.width 100000000": "--model.width must be a whole number from 1",
    "--model.width [1]": "--model.width must be a whole number from 1",
    "--model.width null": "--model.width must be a whole number from 1",
    "--model.classes 3": "makes 3 numbers of an image, and --data has 10 classes",
    "--model.channels 3": "expected input[1, 1, 8, 8] to have 3 channels",
    "--model mlp --model.depth -1": "--model.depth must be a whole number from 0",
    "--model mlp --model.size 9": "does not fit --data",
    "--data torch.utils.data.TensorDataset": "has no first sample",
    "--data builtins.print": "made a NoneType, which is no data set",
    "--data builtins.dict --data.a 1": "has no first sample: KeyError",
    "--data builtins.list": "without samples",
    "--data sys.exit": "failed: SystemExit",
    "--data synthetic --data.samples 1e18": "--data.samples must be a number up to",
    "--data synthetic --data.samples x": "--data.samples must be a number up to",
    "--data synthetic --data.shape 3x1000000x1000000": "--data.shape must be a number up to",
    "--data synthetic --data.shape null": "--data.shape must be like",
    "--data synthetic --data.shape 1x8x8 --data.seed 1e400": "failed: OverflowError",
    "--optimizer SparseAdam": "SparseAdam cannot step: RuntimeError",
    "--optimizer SGD --optimizer.momentum x": "failed: TypeError",
    "--schedule builtins.print": "made a NoneType, not one of torch's schedulers",
    "--schedule torch.optim.lr_scheduler.StepLR --schedule.step_size 0": "cannot step: ZeroDivisionError",
    "--schedule torch.optim.lr_scheduler.StepLR --schedule.step_size x": "cannot step: TypeError",
    "--schedule step --schedule.gamma x": "--schedule.gamma must be a number",
    "--schedule cosine --schedule.gamma 1": "--schedule cosine: there is no argument 'gamma'; it takes final",
    "--task builtins.print": "is no hvdtrain.Task",
    "--task sys.exit": "failed: SystemExit",
}


@pytest.mark.parametrize("words", ODD)
def test_odd_parts_are_refused_by_one_sentence(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main([*shlex.split(words), "--max-steps", "1", "--device", "cpu", "--backend", "local"])
    said = capsys.readouterr().err
    assert code in (1, 2)
    assert ODD[words] in said
    assert len(said) < 1500
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("resnet18", "to have 3 channels, but got 1"), ("vit_b_32", "Wrong image height")]
)
def test_a_torchvision_model_that_does_not_take_the_images_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchvision", reason="needs torchvision")
    monkeypatch.chdir(tmp_path)
    assert main(["--model", name, "--max-steps", "1", "--device", "cpu", "--backend", "local"]) == 2
    assert message in capsys.readouterr().err


def test_trying_a_model_changes_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    check_model(model, (1, 2, 2), 3, name="x")
    assert [part.training for part in model.modules()] == [True, True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_what_a_model_returns_is_looked_at() -> None:
    with pytest.raises(ConfigError, match="makes a tuple of one image"):
        check_model(nn.LSTM(8, 3), (2, 8), 3, name="x")
    check_model(nn.Flatten(), (1, 2, 2), 0, name="no parameters")
    check_model(nn.LazyLinear(3), (4,), 3, name="not made yet")
