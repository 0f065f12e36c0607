"""The main job through the command line: the same result at every world size, resumed exactly, refused clearly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import HOROVOD_GLOO, HOROVOD_MPI, HOROVOD_MPIRUN, MPI, ROOT, TORCH, hvdtrain, run, torchrun


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def parameters(folder: Path) -> str:
    return summary(folder)["parameters_sha256"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    found = {}
    for batch in (60, 61):
        folder = tmp_path_factory.mktemp(f"local{batch}")
        flags = ["--precision", "fp64", "--epochs", "2", "--seed", "1", "--global-batch-size", str(batch)]
        ended = run(hvdtrain(1, *flags, "--backend", "local", "--run-dir", str(folder)))
        assert ended.code == 0, ended.output
        found[batch] = (flags, summary(folder))
    return found


LAUNCHES = [TORCH, HOROVOD_GLOO, HOROVOD_MPI, HOROVOD_MPIRUN, MPI]
CASES = [
    # Every launcher at three ranks, whose shares are unequal; the conformance suite has the same on every engine at more.
    pytest.param(
        launch, ranks, 61, marks=pytest.mark.slow if ranks != 3 or launch in (HOROVOD_GLOO, HOROVOD_MPI) else ()
    )
    for launch in LAUNCHES
    for ranks in (2, 3, 4)
] + [
    *[pytest.param(TORCH, ranks, 60, marks=pytest.mark.slow) for ranks in (2, 3, 4)],
]


@pytest.mark.parametrize(("launch", "ranks", "batch"), CASES, ids=str)
def test_every_engine_and_number_of_ranks_gives_the_result_of_one_process(reference, tmp_path, launch, ranks, batch):
    flags, one = reference[batch]
    ended = run(launch.hvdtrain(ranks, *flags, "--run-dir", str(tmp_path)))
    assert ended.code == 0, ended.output
    many = summary(tmp_path)
    assert many["world_size"] == ranks
    assert many["backend"] == launch.backend
    assert many["steps"] == one["steps"]
    assert many["eval_accuracy"] == one["eval_accuracy"]
    assert abs(many["eval_loss"] - one["eval_loss"]) < 1e-9


def test_a_world_larger_than_the_last_global_batch_gives_the_result_of_one_process(tmp_path):
    # 1,437 training images: the last global batch of 359 has one sample, so that three of four ranks have none.
    flags = [
        "--precision",
        "fp64",
        "--epochs",
        "2",
        "--global-batch-size",
        "359",
        "--accumulate",
        "3",
        "--clip-norm",
        "1",
    ]
    for ranks in (1, 4):
        ended = run(hvdtrain(ranks, *flags, "--run-dir", str(tmp_path / str(ranks))))
        assert ended.code == 0, ended.output
    one, many = summary(tmp_path / "1"), summary(tmp_path / "4")
    assert abs(many["eval_loss"] - one["eval_loss"]) < 1e-9
    assert abs(many["train_loss"] - one["train_loss"]) < 1e-9


@pytest.mark.parametrize(
    ("first", "then"), [pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow), (3, 3)]
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, first, then):
    flags = [
        "--epochs",
        "2",
        "--batch-size",
        "16",
        "--checkpoint-every",
        "7",
        "--optimizer",
        "SGD",
        "--optimizer.momentum",
        "0.9",
    ]
    flags += ["--schedule", "constant"]  # one that `--max-steps` does not shape
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(hvdtrain(first, *flags, "--run-dir", str(whole))).code == 0
    # Ends in the middle of the first epoch, after the checkpoint of step 14.
    assert run(hvdtrain(first, *flags, "--max-steps", "14", "--run-dir", str(parts))).code == 0
    stopped = parameters(parts)
    ended = run(hvdtrain(then, *flags, "--run-dir", str(parts)))
    assert ended.code == 0, ended.output
    assert summary(parts)["resumed_from"].endswith("step-00000014")
    assert parameters(parts) == parameters(whole) != stopped
    steps = [
        json.loads(line)["step"]
        for line in (parts / "metrics.jsonl").read_text().splitlines()
        if '"kind": "step"' in line
    ]
    assert steps == sorted(set(steps))


@pytest.mark.slow  # test_resume_anywhere has one such move
def test_a_run_resumes_on_another_number_of_ranks_with_the_same_global_batches(tmp_path):
    flags = ["--epochs", "2", "--global-batch-size", "60", "--precision", "fp64", "--schedule", "constant"]
    assert run(hvdtrain(1, *flags, "--run-dir", str(tmp_path / "one"))).code == 0
    assert run(hvdtrain(3, *flags, "--max-steps", "10", "--run-dir", str(tmp_path / "moved"))).code == 0
    ended = run(hvdtrain(2, *flags, "--run-dir", str(tmp_path / "moved")))
    assert ended.code == 0, ended.output
    assert abs(summary(tmp_path / "moved")["eval_loss"] - summary(tmp_path / "one")["eval_loss"]) < 1e-9


@pytest.mark.parametrize("asked", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_saves_and_ends_with_a_code_of_its_own_and_the_run_goes_on_from_there(tmp_path, asked):
    flags = ["--epochs", "400", "--batch-size", "8", "--run-dir", str(tmp_path)]
    process = subprocess.Popen(
        hvdtrain(1, *flags), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 60
    while not any((tmp_path / "checkpoints").glob("step-*")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(asked)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75, output
    assert "asked to stop" in output
    assert ("once more ends at once" in output) == (asked == signal.SIGINT)
    saved = max((tmp_path / "checkpoints").iterdir()).name
    ended = run(hvdtrain(1, *flags, "--max-steps", str(int(saved[-8:]) + 1)))
    assert ended.code == 0, ended.output
    assert summary(tmp_path)["resumed_from"].endswith(saved)


@pytest.mark.parametrize("asked", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all_ranks_at_the_same_step(tmp_path, asked):
    flags = ["--epochs", "400", "--batch-size", "8", "--run-dir", str(tmp_path)]
    process = subprocess.Popen(
        hvdtrain(2, *flags),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 60
        while not any((tmp_path / "checkpoints").glob("step-*")):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), asked)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "asked to stop after step" in output
    assert "exitcode  : 75" in output
    assert "Traceback (most recent call last):\n  File" not in output.split("ChildFailedError")[0].split("torchrun")[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backend", "tourch"], "torch"),
        (["--task", "no_such_module:Task"], "no_such_module"),
        (["--model", "cnm"], "cnn"),
        (["--epoch", "2"], "--epochs"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--device", "cuda"], "--device cpu"),
        (["--data", "imagefolder:/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, flags, message):
    if flags == ["--device", "cuda"]:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    ended = run(hvdtrain(1, *flags, "--run-dir", str(tmp_path)))
    assert ended.code in (1, 2)
    assert "Traceback" not in ended.output
    assert message in ended.output
    assert ended.output.startswith("hvdtrain")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_dir_that_cannot_be_written_is_told_before_training(tmp_path, ranks):
    (tmp_path / "file").touch()
    ended = run(hvdtrain(ranks, "--run-dir", str(tmp_path / "file" / "run")))
    assert ended.code != 0
    assert "nothing can be written in" in ended.output
    assert (
        "Traceback (most recent call last):\n  File"
        not in ended.output.split("ChildFailedError")[0].split("torchrun")[0]
    )


def test_local_under_torchrun_is_refused_with_what_would_work(tmp_path):
    ended = run(torchrun(2, "-m", "hvdtrain", "--backend", "local", "--run-dir", str(tmp_path)))
    assert ended.code != 0
    assert "backend 'local' is one process" in ended.output
    assert ended.output.count("backend 'local' is one process") == 1


def test_a_nan_loss_stops_all_ranks_and_names_step_and_rank(tmp_path):
    ended = run(hvdtrain(2, "--lr", "1e6", "--optimizer", "SGD", "--epochs", "2", "--run-dir", str(tmp_path)))
    assert ended.code != 0
    assert "the loss is" in ended.output
    assert "on rank" in ended.output


def test_on_nan_skip_goes_on(tmp_path):
    ended = run(
        hvdtrain(
            2, "--lr", "1e6", "--optimizer", "SGD", "--epochs", "1", "--on-nan", "skip", "--run-dir", str(tmp_path)
        )
    )
    assert ended.code == 0, ended.output
    assert summary(tmp_path)["skipped_steps"] > 0


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_mixed_precision_trains_on_two_ranks(tmp_path, precision):
    ended = run(hvdtrain(2, "--precision", precision, "--epochs", "2", "--run-dir", str(tmp_path)))
    assert ended.code == 0, ended.output
    assert summary(tmp_path)["eval_accuracy"] > 0.7


def test_loader_processes_give_the_same_training(tmp_path):
    for workers in (0, 2):
        flags = ["--epochs", "1", "--workers", str(workers), "--run-dir", str(tmp_path / str(workers))]
        ended = run(hvdtrain(2, *flags))
        assert ended.code == 0, ended.output
    assert parameters(tmp_path / "0") == parameters(tmp_path / "2")
