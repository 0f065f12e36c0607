"""What a task of the user's brings to a run: its optimizer, its model."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.cli.train import run
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError


class Line:
    """A small task."""

    def build_model(self):
        return nn.Linear(4, 1)

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch)}

    def train_data(self):
        return ArrayDataset(torch.linspace(-1, 1, 40).reshape(10, 4), torch.ones(10, 1))

    def eval_data(self):
        return self.train_data()


class WithOptimizer(Line):
    def build_optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.75)


class StopsEarly(Line):
    def build_callbacks(self):
        return [hvdtrain.EarlyStopping(patience=1, min_delta=100.0)]


class WithNoOptimizer(Line):
    def build_optimizer(self, model):
        return [model]


class Compiled(Line):
    def build_model(self):
        return torch.compile(nn.Linear(4, 1), backend="eager")


def train(task, folder, *more):
    flags = ["--task", f"{__name__}:{task.__name__}", "--backend", "local", "--device", "cpu", "--run-dir", str(folder)]
    run([*flags, "--epochs", "2", "--batch-size", "5", "--log-every", "1", "--schedule", "constant", *more])
    return json.loads((folder / "summary.json").read_text())


def learning_rates(folder):
    return [record["lr"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "lr" in (record := json.loads(line))]  # fmt: skip


def test_a_task_may_build_its_optimizer(tmp_path):
    assert train(WithOptimizer, tmp_path)["steps"] == 4
    assert learning_rates(tmp_path) == [0.5] * 4


@pytest.mark.parametrize(
    "flags", [["--lr", "0.1"], ["--optimizer", "SGD"], ["--scale-lr"], ["--optimizer.momentum", "0.5"]]
)
def test_an_optimizer_by_flags_beside_the_tasks_own_is_refused(tmp_path, flags):
    with pytest.raises(
        ConfigError, match=rf"build_optimizer makes the optimizer, so {flags[0].partition('.')[0]} would have no"
    ):
        train(WithOptimizer, tmp_path, *flags)


def test_a_task_that_builds_no_optimizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="build_optimizer made a list, not a torch optimizer"):
        train(WithNoOptimizer, tmp_path)


def test_a_finished_run_whose_summary_was_lost_gets_one_without_a_rate(tmp_path):
    first = train(Line, tmp_path)
    (tmp_path / "summary.json").unlink()
    again = train(Line, tmp_path)
    assert again["samples_per_second"] is None
    assert again["parameters_sha256"] == first["parameters_sha256"]


def test_a_compiled_model_has_the_fingerprint_of_the_plain_one(tmp_path):
    plain, compiled = train(Line, tmp_path / "plain"), train(Compiled, tmp_path / "compiled")
    assert compiled["parameters_sha256"] == plain["parameters_sha256"]
    assert train(Line, tmp_path / "compiled", "--epochs", "3")["resumed_from"] is not None


def test_a_task_may_build_callbacks_and_the_run_says_why_it_ended(tmp_path, capsys):
    assert train(StopsEarly, tmp_path, "--epochs", "9")["epochs"] == 2
    assert "ended early: loss has not been better than" in capsys.readouterr().out
    assert train(StopsEarly, tmp_path, "--epochs", "9")["epochs"] == 2
    assert "this run was ended by a callback already: 2 epochs" in capsys.readouterr().out
