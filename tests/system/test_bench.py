"""``hvdtrain bench engines``: real launchers, in turns; what fails under one engine is said, and the others are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TASK = """
import os
import torch
from torch import nn
from hvdtrain.data.arrays import ArrayDataset

class Task:
    def build_model(self):
        if "OMPI_COMM_WORLD_RANK" in os.environ:
            raise ValueError("planted under mpirun")
        return nn.Linear(4, 1)

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch)}

    def train_data(self):
        return ArrayDataset(torch.randn(640, 4), torch.randn(640, 1))

    def eval_data(self):
        return None
"""


def bench(folder: Path, *flags: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "hvdtrain", "bench", "engines", "--rounds", "1", "--steps", "16", "--device", "cpu", *flags],
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}, capture_output=True, text=True, timeout=400,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_engines_are_compared_and_all_of_it_is_written_down(tmp_path):
    code, said = bench(tmp_path, "--model", "mlp", "--engines", "mpi,torch", "--out", "found.json")
    assert code == 0, said
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["rounds"]) == {"mpi", "torch"}
    assert f"{found['best']} is the fastest: " in said
    assert all(trial["samples_per_second"] > 0 for of in found["rounds"].values() for trial in of)


@pytest.mark.slow
def test_an_engine_that_fails_is_said_and_the_others_are_compared(tmp_path):
    (tmp_path / "my_tasks.py").write_text(TASK)
    code, said = bench(tmp_path, "--task", "my_tasks:Task", "--batch-size", "8", "--engines", "torch,mpi")
    assert code == 1, said
    assert "mpi (mpirun) failed: " in said
    assert "planted under mpirun" in said
    assert "torch is the fastest: " in said


@pytest.mark.slow
def test_an_engine_under_which_the_task_ends_too_early_is_said(tmp_path):
    ends = """
    def build_callbacks(self):
        return [Ends()]

class Ends:
    def on_step(self, trainer, event):
        if event.step == 3 and trainer.backend.name == "mpi":
            trainer.stop("enough")
"""
    text = TASK.replace('if "OMPI_COMM_WORLD_RANK" in os.environ:', "if False:").replace("640", "64")
    (tmp_path / "my_ending.py").write_text(text + ends)
    words = ["--task", "my_ending:Task", "--engines", "mpi,torch", "--batch-size", "32"]
    code, said = bench(tmp_path, *words)
    assert code == 1, said
    assert "has too few logged steps" in said
    assert "torch is the fastest: " in said
    assert "Traceback" not in said
