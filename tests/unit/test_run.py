"""A run from its configuration, in this process: what its folder holds, and what a second start does to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.cli import main
from hvdtrain.errors import ConfigError
from hvdtrain.run import run_training
from hvdtrain.settings.config import Component, TrainConfig

FLAGS = ["--model", "mlp", "--batch-size", "256", "--schedule", "constant", "--backend", "local", "--device", "cpu"]


def hvdtrain(folder: Path, *flags: str) -> int:
    return main([*FLAGS, "--run-dir", str(folder), *flags])


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of writing."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return values


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert hvdtrain(folder, "--epochs", "1") == 0
    return folder


def test_a_finished_run_that_is_started_again_changes_no_file_and_says_so(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    assert {"config.yaml", "summary.json", "metrics.jsonl"} < {*before}
    assert hvdtrain(finished, "--epochs", "1") == 0
    assert contents(finished) == before
    said = capsys.readouterr().out
    assert "this run was finished already: 1 epochs, 6 steps" in said
    assert "samples/s" not in said


def test_a_finished_run_without_a_summary_gets_one_that_knows_no_speed(finished: Path) -> None:
    text = (finished / "summary.json").read_text()
    (finished / "summary.json").unlink()
    assert hvdtrain(finished, "--epochs", "1") == 0
    again, before = summary(finished), json.loads(text)
    assert again["samples_per_second"] is None
    for name in ("steps", "train_loss", "eval_metrics", "parameters_sha256"):
        assert again[name] == before[name]
    (finished / "summary.json").write_text(text)


def test_no_epochs_in_a_finished_run_evaluate_its_checkpoint_and_leave_its_summary(
    finished: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(finished)
    assert hvdtrain(finished, "--epochs", "0") == 0
    accuracy = summary(finished)["eval_accuracy"]
    said = capsys.readouterr().out
    assert f"evaluated: accuracy {accuracy:.4f}" in said
    assert "evaluated " + str(finished / "checkpoints" / "step-00000006") in said
    assert {name for name, file in contents(finished).items() if before.get(name) != file} == {"metrics.jsonl"}
    assert caplog.text == ""


def test_no_epochs_in_a_new_folder_evaluate_the_untrained_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hvdtrain(tmp_path / "run", "--epochs", "0", "--warmup-epochs", "5") == 0
    written = summary(tmp_path / "run")
    assert (written["steps"], written["train_loss"], written["samples_per_second"]) == (0, None, None)
    assert 0 < written["eval_accuracy"] < 0.5
    assert "train loss" not in capsys.readouterr().out


def test_no_epochs_without_evaluation_data_are_refused() -> None:
    task = Component(f"{__name__}:NothingToEvaluate")
    with pytest.raises(ConfigError, match="--epochs 0 only evaluates, and there are no evaluation data"):
        run_training(TrainConfig(task=task, epochs=0, backend="local", device="cpu"))


def test_a_generator_is_refused_with_a_way_out() -> None:
    task = Component(f"{__name__}:Once")
    with pytest.raises(ConfigError, match=r"generator can be read only once.*give the function that makes it"):
        run_training(TrainConfig(task=task, backend="local", device="cpu"))


class NothingToEvaluate:
    def build_model(self) -> Any:
        import torch

        return torch.nn.Linear(1, 1)

    def loss(self, model: Any, batch: Any) -> Any:
        return model(batch).mean()

    def metrics(self, model: Any, batch: Any) -> dict[str, Any]:
        return {"loss": self.loss(model, batch)}

    def train_data(self) -> Any:
        return [[1.0]]

    def eval_data(self) -> None:
        return None


class Once(NothingToEvaluate):
    def train_data(self) -> Any:
        return ([1.0] for _ in range(3))


def test_the_configuration_in_the_folder_runs_the_same_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    assert main(["--config", str(finished / "config.yaml"), "--run-dir", str(again)]) == 0
    assert summary(again)["parameters_sha256"] == summary(finished)["parameters_sha256"]
    capsys.readouterr()
    for folder in (finished, again):
        assert main(["--config", str(folder / "config.yaml"), "--print-config"]) == 0
    first, second = capsys.readouterr().out.split("# data\n")[1:]
    assert first.replace(str(finished), str(again)) == second


def test_a_run_that_goes_on_with_other_settings_says_so_and_keeps_its_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert hvdtrain(tmp_path, "--epochs", "1", "--lr", "0.01") == 0
    recorded = (tmp_path / "config.yaml").read_bytes()
    assert caplog.text == ""
    assert hvdtrain(tmp_path, "--epochs", "2", "--lr", "0.01") == 0
    assert "this run goes on with other settings" in caplog.text
    assert "--epochs 2 (1 there)" in caplog.text
    assert (tmp_path / "config.yaml").read_bytes() == recorded
    assert hvdtrain(tmp_path, "--epochs", "1", "--resume", "never") == 0
    assert b"lr: 0.002" in (tmp_path / "config.yaml").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "no_such_module:Task"], "no_such_module"),
        (["--model", "cnm"], "cnn"),
        (["--model.widht", "3"], "did you mean 'width'"),
        (["--data", "imagefolder:/nowhere"], "/nowhere"),
        (["--optimizer", "SDG"], "SGD"),
        (["--warmup-steps", "61"], "--warmup-steps 61 is more than the 60 steps of this run (6 an epoch)"),
        (["--schedule", "torch.optim.lr_scheduler.ConstantLR", "--warmup-steps", "3"], "--warmup-steps goes with"),
        (["--resume", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_setting_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    without_task = [] if "--task" in flags else FLAGS
    code = main([*without_task, "--run-dir", str(tmp_path / "run"), *flags])
    assert code in (1, 2)
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("steps", "expected"), [(0, [4, 4, 4, 4]), (2, [2, 4, 4, 4]), (4, [1, 2, 3, 4])])
def test_warm_up_counts_optimizer_steps(tmp_path: Path, steps: int, expected: list[int]) -> None:
    flags = ["--warmup-steps", str(steps), "--max-steps", "4", "--log-every", "1", "--lr", "4"]
    assert hvdtrain(tmp_path, *flags) == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [record["lr"] for record in records if record["kind"] == "step"]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(("last_batch", "steps"), [("keep", 6), ("drop", 5), ("merge", 5)])
def test_the_last_batch_is_kept_dropped_or_merged(tmp_path: Path, last_batch: str, steps: int) -> None:
    # 1,437 images in global batches of 256: five, and one of 157.
    assert hvdtrain(tmp_path, "--epochs", "1", "--last-batch", last_batch) == 0
    assert summary(tmp_path)["steps"] == steps


def test_a_redirected_output_has_step_lines_whatever_is_logged_and_without_evaluations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hvdtrain(tmp_path, "--max-steps", "3", "--log-every", "1000") == 0
    assert "\nstep 1/3  epoch 1/10  loss " in capsys.readouterr().out
    assert '"kind": "step"' not in (tmp_path / "metrics.jsonl").read_text()
