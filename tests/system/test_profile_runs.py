"""``--profile`` under each launcher: what is in the folder, and that a browser can read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvdtrain.doctor.launchers import here_with_horovod
from hvdtrain.launch.starting import surroundings

pytestmark = pytest.mark.slow
STARTERS = {starter.name: starter for starter in here_with_horovod()}


def profiled(name: str, folder: Path, *flags: str) -> str:
    starter = STARTERS.get(name)
    if starter is None:
        pytest.skip(f"{name} is not here")
    words = [
        "-m",
        "hvdtrain",
        "--model",
        "mlp",
        "--max-steps",
        "24",
        "--epochs",
        "9",
        "--run-dir",
        str(folder),
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        starter.command(2, [*words, "--backend", starter.backend, "--profile", "5:8", *flags]),
        env=surroundings(os.environ), capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", ["python", "torchrun", "mpirun", "horovodrun --gloo", "horovodrun --mpi"])
def test_a_profile_has_all_ranks_and_says_what_binds(tmp_path, name):
    said = profiled(name, tmp_path / "run")
    folder = tmp_path / "run" / "profile"
    assert "profiled 4 steps" in said
    assert " binds the step: " in said
    assert "USDT" not in said
    ranks = 1 if name == "python" else 2
    names = {
        event["args"]["name"].split(" on ")[0]
        for event in json.loads((folder / "trace.json").read_text())["traceEvents"]
        if event["name"] == "process_name"
    }
    assert names == {f"rank {rank}" for rank in range(ranks)}
    assert len(json.loads((folder / "verdict.json").read_text())["ranks"]) == ranks
    timeline = folder / "horovod_timeline.json"
    assert timeline.exists() == name.startswith("horovodrun")
    if timeline.exists():
        events = json.loads(timeline.read_text())
        assert any("ALLREDUCE" in str(event.get("name")) for event in events)
    assert {"operators.txt", "python.txt", "python.pstats"} <= {file.name for file in folder.iterdir()}


def test_a_run_that_goes_on_behind_these_steps_says_so_and_trains(tmp_path):
    profiled("python", tmp_path / "run")
    said = profiled("python", tmp_path / "run", "--max-steps", "30")
    assert "--profile 5:8: this run goes on after step 24" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 30


def test_horovods_own_timeline_of_the_whole_run_stays_the_users(tmp_path):
    profiled("horovodrun --mpi", tmp_path / "run", "--horovod.timeline", str(tmp_path / "mine.json"))
    assert not (tmp_path / "run" / "profile" / "horovod_timeline.json").exists()
    assert (tmp_path / "mine.json").stat().st_size > 1000


@pytest.mark.parametrize(("text", "said"), [("10", "give the first and the last step"), ("0:5", "counted from 1"), ("9:8", "not before"), ("1:600", "at most 500")])  # fmt: skip
def test_a_wrong_range_is_refused_at_once(tmp_path, text, said):
    done = subprocess.run(
        [sys.executable, "-m", "hvdtrain", "--profile", text, "--run-dir", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_told_to_end_in_the_middle_saves_and_ends_as_ever(tmp_path):
    words = [
        "-m",
        "hvdtrain",
        "--model",
        "mlp",
        "--epochs",
        "500",
        "--run-dir",
        str(tmp_path / "run"),
        "--profile",
        "5:500",
    ]
    with subprocess.Popen(
        [sys.executable, *words, "--backend", "local", "--device", "cpu"], env=surroundings(os.environ), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            end = time.monotonic() + 120
            while not (tmp_path / "run" / "profile").exists():
                assert time.monotonic() < end
                time.sleep(0.02)
            process.terminate()
            said, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 75, said
    assert "nothing of it is written" in said
    assert not (tmp_path / "run" / "profile" / "trace.json").exists()
