"""What a second start in the folder of a run does to the first: set aside, refused, resumed, or made anew; never lost."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hvdtrain.cli import main
from hvdtrain.run import run_training
from hvdtrain.settings.config import Component, TrainConfig

FLAGS = ["--model", "mlp", "--batch-size", "256", "--schedule", "constant", "--backend", "local", "--device", "cpu"]


def hvdtrain(folder: Path, *flags: str) -> int:
    return main([*FLAGS, "--run-dir", str(folder), *flags])


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def records(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs of six steps."""
    folder = tmp_path_factory.mktemp("made") / "run"
    assert hvdtrain(folder, "--epochs", "3", "--log-every", "1") == 0
    return folder


@pytest.fixture
def used(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_a_new_run_in_a_used_folder_sets_the_old_one_aside_and_is_what_is_resumed(
    used: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {name: (used / name).read_bytes() for name in ("metrics.jsonl", "summary.json", "config.yaml")}
    for number in (1, 2):
        assert hvdtrain(used, "--max-steps", "2", "--resume", "never") == 0
        assert capsys.readouterr().out.count(f"set aside in {used / 'checkpoints'}.{number}: ") == 1
    assert steps(used / "checkpoints") == [2]
    assert steps(used / "checkpoints.1") == [6, 12, 18]
    assert {name: (used / "checkpoints.1" / name).read_bytes() for name in old} == old
    assert hvdtrain(used, "--max-steps", "3") == 0
    assert json.loads((used / "summary.json").read_text())["resumed_from"].endswith("checkpoints/step-00000002")


def test_a_new_run_that_ends_before_its_first_checkpoint_does_not_bring_the_old_one_back(used: Path) -> None:
    assert hvdtrain(used, "--resume", "never", "--lr", "1e6", "--optimizer", "SGD") == 1  # the loss is NaN
    assert steps(used / "checkpoints") == []
    assert not (used / "summary.json").exists()
    assert hvdtrain(used, "--max-steps", "1") == 0
    assert json.loads((used / "summary.json").read_text())["resumed_from"] is None


@pytest.mark.parametrize("name", ["step", pytest.param("path", marks=pytest.mark.slow)])
def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(used: Path, name: str) -> None:
    which = "12" if name == "step" else str(used / "checkpoints" / "step-00000012")
    assert hvdtrain(used, "--max-steps", "14", "--keep", "2", "--log-every", "1", "--resume", which) == 0
    assert steps(used / "checkpoints") == [12, 14]
    assert steps(used / "checkpoints.1") == [18]
    assert [record["step"] for record in records(used)] == [*range(1, 15)]
    assert [record["step"] for record in records(used / "checkpoints.1")] == [*range(1, 19)]


def test_evaluating_an_older_checkpoint_moves_nothing(used: Path) -> None:
    assert hvdtrain(used, "--epochs", "0", "--resume", "12") == 0
    assert steps(used / "checkpoints") == [6, 12, 18]
    assert not (used / "checkpoints.1").exists()


def test_where_all_checkpoints_are_damaged_nothing_is_trained_and_nothing_deleted(
    used: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (used / "checkpoints").glob("step-*"):
        (path / "ranks.json").write_text("")
    before = sorted(used.rglob("*"))
    assert hvdtrain(used, "--epochs", "4") == 1
    said = capsys.readouterr().err
    assert "none of the 3 checkpoints in" in said
    assert "--resume never sets them aside and begins anew" in said
    assert sorted(used.rglob("*")) == before
    assert hvdtrain(used, "--max-steps", "1", "--resume", "never") == 0
    assert steps(used / "checkpoints.1") == [6, 12, 18]


def test_the_learning_rate_is_the_command_lines_and_that_is_said(used: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert hvdtrain(used, "--epochs", "4", "--log-every", "1", "--lr", "0.01") == 0
    assert "step-00000018 was written with: --epochs 4 (3 there); --lr 0.01 (0.002 there)" in caplog.text
    assert [record["lr"] for record in records(used)] == [0.002] * 18 + [0.01] * 6


def test_another_optimizer_is_refused_by_name(used: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hvdtrain(used, "--epochs", "4", "--optimizer", "SGD") == 1
    assert "was written with --optimizer AdamW, and this run has SGD" in capsys.readouterr().err
    assert steps(used / "checkpoints") == [6, 12, 18]


HOLDER = """
import sys, time
from pathlib import Path
from hvdtrain.folder_lock import take
lock = take(Path(sys.argv[1]) / ".lock")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def busy(used: Path) -> Iterator[subprocess.Popen[str]]:
    """Another job that has the folder, and is stopped."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(used)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGSTOP)
    yield holder
    holder.kill()
    holder.communicate()


def test_a_second_job_in_a_folder_is_refused_by_the_first_ones_name_until_that_is_dead(
    used: Path, busy: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    leftover = used / "checkpoints" / "partial-7-step-00000024"
    leftover.mkdir()  # what the other one is writing
    assert hvdtrain(used, "--epochs", "4") == 1
    said = capsys.readouterr().err
    assert f"{used} is in use by another job, process {busy.pid} on " in said
    assert said.count("\n") == 1
    assert leftover.exists()
    assert steps(used / "checkpoints") == [6, 12, 18]
    busy.kill()
    busy.wait()
    assert hvdtrain(used, "--max-steps", "19", "--epochs", "4") == 0
    assert not leftover.exists()


class DeletesItsFolder:
    """A task in whose fourth step somebody deletes the folder of the run."""

    def __init__(self, folder: str) -> None:
        self.folder, self.calls = folder, 0

    def build_model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.calls += 1
        if self.calls == 4:
            shutil.rmtree(self.folder)
        return model(batch).square().mean()

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"loss": model(batch).square().mean()}

    def train_data(self) -> Any:
        return [torch.ones(1)] * 12

    def eval_data(self) -> Any:
        return [torch.ones(1)] * 2


def test_a_run_whose_folder_is_deleted_makes_it_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    task = Component(f"{__name__}:DeletesItsFolder", {"folder": str(folder)})
    run_training(
        TrainConfig(
            task=task,
            epochs=2,
            batch_size=2,
            run_dir=str(folder),
            backend="local",
            device="cpu",
            log_every=1,
            checkpoint_every=1,
        )
    )
    assert [record["step"] for record in records(folder)] == [*range(1, 13)]
    assert steps(folder / "checkpoints") == [10, 11, 12]
    assert {"config.yaml", "summary.json"} < {path.name for path in folder.iterdir()}
    assert "metrics.jsonl was deleted while this run wrote it" in caplog.text
    assert f"{folder} was deleted while this run wrote in it; it is made anew" in caplog.text
