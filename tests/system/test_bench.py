"""``hvdtrain bench``: real launchers, in turns; what fails under one engine is said, and the others are compared."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.launch.starting import starters, surroundings

BRIEFLY = [
    "--model",
    "small",
    "--batch-size",
    "4",
    "--rounds",
    "1",
    "--warmup",
    "1",
    "--batches",
    "2",
    "--iterations",
    "2",
]
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


ENGINES = ["engines", "--rounds", "1", "--steps", "16", "--device", "cpu"]


def hvdtrain(folder: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "hvdtrain", *words], cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])},
        capture_output=True, text=True, timeout=400, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def bench(folder: Path, *flags: str) -> tuple[int, str]:
    code, out, err = hvdtrain(folder, "bench", *ENGINES, *flags)
    return code, out + err


@pytest.mark.slow
def test_engines_are_compared_and_all_of_it_is_written_down(tmp_path):
    code, said = bench(tmp_path, "--model", "mlp", "--engines", "mpi,torch", "--out", "found.json")
    assert code == 0, said
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["rounds"]) == {"mpi", "torch"}
    assert f"{found['best']} is the fastest: " in said
    assert all(trial["samples_per_second"] > 0 for of in found["rounds"].values() for trial in of)
    assert {name: of["launcher"] for name, of in found["launches"].items()} == {"mpi": "mpirun", "torch": "torchrun"}
    assert found["machine"]["host"] == socket.gethostname()


@pytest.mark.slow
def test_a_recommendation_is_followed_under_its_launcher_and_refused_under_another(tmp_path):
    code, said = bench(tmp_path, "--model", "mlp", "--launcher", "mpirun", "--engines", "mpi,torch", "--out", "./")
    assert code == 0, said
    best = json.loads((tmp_path / "engines.json").read_text())["best"]
    here = {each.name: each for each in starters(gloo=False, mpi=False)}
    job = ["-m", "hvdtrain", "--backend", "auto:engines.json", "--model", "mlp", "--max-steps", "2", "--device", "cpu"]
    for launcher, ranks in (("mpirun", 2), ("torchrun", 2), ("mpirun", 1)):
        command = here[launcher].command(ranks, [*job, "--run-dir", f"run-{launcher}-{ranks}"])
        done = subprocess.run(
            command, cwd=tmp_path, env=surroundings({**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}),
            capture_output=True, text=True, timeout=200, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if (launcher, ranks) == ("mpirun", 2):
            assert done.returncode == 0, done.stderr
            assert json.loads((tmp_path / "run-mpirun-2" / "summary.json").read_text())["backend"] == best
            continue
        assert done.returncode != 0
        differs = "ranks 2 there, 1 here" if ranks == 1 else f"launcher of {best} mpirun there, torchrun here"
        assert differs in done.stderr
        assert not (tmp_path / f"run-{launcher}-{ranks}").exists()


@pytest.mark.slow
def test_collectives_of_every_engine_are_timed_beside_raw_mpi_and_a_copy_and_drawn(tmp_path):
    words = ["--max-bytes", "64", "--rounds", "1", "--seconds", "0.001", "--out", "found.json", "--plot", "drawn.png"]
    code, out, err = hvdtrain(tmp_path, "bench", "collectives", *words)
    assert code == 0, out + err
    found = json.loads((tmp_path / "found.json").read_text())
    contenders = {*found["results"]["all-reduce"]["64"], *found["results"]["copy"]["64"]}
    assert {"torch", "mpi", "raw MPI", "copy"} <= contenders
    assert set(found["results"]) == {"all-reduce", "all-gather", "reduce-scatter", "broadcast", "all-to-all", "copy"}
    for each in found["results"]["all-to-all"]["32"].values():
        low, median, high = each["seconds"]
        assert 0 < low <= median <= high
        assert each["bus_bytes_per_second"] == pytest.approx(16 / median)
    assert "all-gather, 2 ranks" in out
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_step_is_timed_under_every_engine_and_all_train_alike(tmp_path):
    code, out, err = hvdtrain(tmp_path, "bench", "step", *BRIEFLY, "--json")
    assert code == 0, out + err
    found = json.loads(out)
    assert {"alone", "ddp", "ddp-mpi4py", "torch", "mpi"} <= set(found["results"])
    assert found["unlike"] == ""
    losses = {name: of["third_loss"] for name, of in found["results"].items()}
    assert losses["mpi"] == pytest.approx(losses["ddp"], rel=1e-4)
    assert losses["alone"] != pytest.approx(losses["ddp"], rel=1e-4)


@pytest.mark.slow
def test_scaling_is_measured_fitted_and_projected(tmp_path):
    more = [
        "--engines",
        "mpi",
        "--ranks",
        "1,2",
        "--max-bytes",
        "4K",
        "--seconds",
        "0.001",
        "--project",
        "64",
        "--plot",
        "s.svg",
    ]
    code, out, err = hvdtrain(tmp_path, "bench", "scaling", *BRIEFLY, *more, "--out", "found.json")
    assert code == 0, out + err
    found = json.loads((tmp_path / "found.json").read_text())["results"]["mpi"]
    assert found["efficiency"]["1"] == 1
    assert found["links"]["2"]["latency_s"] > 0
    assert set(found["projected_efficiency"]) == {"ring", "tree", "hierarchical", "compressed", "diloco"}
    assert "<svg" in (tmp_path / "s.svg").read_text()


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
