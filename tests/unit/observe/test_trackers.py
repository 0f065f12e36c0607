"""What trackers write is read back by their own libraries; a run that goes on goes on there."""

from __future__ import annotations

import shutil

import pytest

from hvdtrain.errors import ConfigError
from hvdtrain.observe.logger import EvalRecord, FanOut, StepRecord
from hvdtrain.observe.trackers import chosen
from hvdtrain.settings.config import TrainConfig, trackers_of

SETTINGS = {"lr": 0.1, "model": {"name": "mlp", "width": 64}}


def step(number, loss, gradient_norm=None):
    return StepRecord(
        step=number, total_steps=9, epoch=0, loss=loss, lr=0.5, samples_per_second=100.0, gradient_norm=gradient_norm
    )


def report(loggers, *steps):
    logger = FanOut(loggers)
    for number in steps:
        logger.log_step(step(number, 1 / number, gradient_norm=2.0 if number == 2 else None))
    logger.log_eval(EvalRecord(step=steps[-1], epoch=1, metrics={"accuracy": 0.75}))
    logger.close()


def curves(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    texts = [tag for tag in found.Tags()["tensors"] if tag.startswith("settings")]
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}, texts


def test_tensorboard_has_every_curve_and_the_settings(tmp_path):
    report(chosen("tensorboard", tmp_path, SETTINGS, 0), 1, 2)
    found, texts = curves(tmp_path)
    assert found["train/loss"] == {1: 1.0, 2: 0.5}
    assert found["train/lr"] == {1: 0.5, 2: 0.5}
    assert found["train/gradient_norm"] == {2: 2.0}
    assert found["train/samples_per_second"] == {1: 100.0, 2: 100.0}
    assert found["eval/accuracy"] == {2: 0.75}
    assert texts
    assert not [name for name in found if name.endswith(("/step", "/epoch", "/total_steps"))]


def test_a_run_that_goes_on_takes_back_what_lay_beyond_its_checkpoint(tmp_path):
    report(chosen("auto", tmp_path, SETTINGS, 0), 1, 2, 3, 4)
    report(chosen("auto", tmp_path, SETTINGS, 2), 3, 5)
    assert list(curves(tmp_path)[0]["train/loss"]) == [1, 2, 3, 5]
    report(chosen("auto", tmp_path, SETTINGS, 0), 1, 3)
    assert list(curves(tmp_path)[0]["train/loss"]) == [1, 3]


def test_a_folder_that_is_deleted_meanwhile_costs_what_was_in_it(tmp_path, caplog):
    logger = FanOut(chosen("tensorboard", tmp_path / "run", SETTINGS, 0))
    logger.log_step(step(1, 1.0))
    for number in (2, 3):
        shutil.rmtree(tmp_path / "run")
        logger.log_step(step(number, 1.0))
    logger.close()
    assert list(curves(tmp_path / "run")[0]["train/loss"]) == [3]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensorbord", "did you mean 'tensorboard'"),
        ("", "must not be empty"),
        ("tensorboard,", "none of auto"),
        ("wandb,wandb", "names wandb twice"),
        ("none,wandb", "'none' is none of"),
    ],
)
def test_what_is_no_tracker_is_refused_with_the_configuration(text, said):
    with pytest.raises(ConfigError, match=said):
        TrainConfig(logger=text)


def test_none_is_none_and_several_are_several():
    assert TrainConfig(logger="none").logger == "none"
    assert trackers_of("wandb, mlflow") == ["wandb", "mlflow"]


def test_one_that_is_not_installed_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--logger wandb: .* pip install 'hvdtrain\[trackers\]'"):
        chosen("wandb", tmp_path, SETTINGS, 0)
    assert chosen("none", tmp_path, SETTINGS, 0) == []
