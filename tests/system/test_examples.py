"""Every example runs as it stands and does what it says."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from launching import ROOT, horovodrun_gloo, horovodrun_mpi, mpirun, python, run, torchrun

from hvdtrain.training.checkpoint_files import FILES

EXAMPLES = ROOT / "examples"


def accuracy(output: str) -> float:
    return float(re.search(r"accuracy (\d\.\d+)", output)[1])


@pytest.mark.parametrize(
    "name",
    [
        "own_loop",
        "data_parallel",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("one_process", "mnist_files")),
    ],
)
def test_an_example_learns(name):
    if name == "mnist_files":
        pytest.importorskip("torchvision", reason="needs torchvision", exc_type=(ImportError, RuntimeError))
    ended = run([sys.executable, str(EXAMPLES / f"{name}.py")])
    assert ended.code == 0, ended.output
    assert accuracy(ended.output) > 0.9


def test_own_loop_learns_on_two_ranks():
    ended = run(torchrun(2, str(EXAMPLES / "own_loop.py")))
    assert ended.code == 0, ended.output
    assert "2 rank(s)" in ended.output
    assert accuracy(ended.output) > 0.9


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_own_loop_that_is_resumed_ends_bit_for_bit_as_if_it_had_not_been_stopped(tmp_path: Path, ranks):
    example = str(EXAMPLES / "own_loop_resume.py")
    argv = [sys.executable, example] if ranks == 1 else torchrun(ranks, example)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for more in ([str(whole)], [str(parts), "--stop-after", "57"], [str(parts)]):
        ended = run([*argv, *more])
        assert ended.code == 0, ended.output
        if "--stop-after" in more:
            assert max(parts.iterdir()).name == "step-00000057"
    assert max(parts.iterdir()).name == max(whole.iterdir()).name > "step-00000057"
    for file in FILES:
        one, other = (json.loads((max(run.iterdir()) / "manifest.json").read_text())["files"] for run in (whole, parts))
        assert one[file] == other[file], file


LAUNCHES = {
    "python": (python, 1),
    "torchrun": (torchrun, 2),
    "mpirun": (mpirun, 3),
    "horovodrun --mpi": (horovodrun_mpi, 2),
    "horovodrun --gloo": (horovodrun_gloo, 2),
}
EXAMPLE_LAUNCHES = [  # each example under one launcher, and under all in `make test-all`
    pytest.param(example, launcher, marks=() if launcher == first else pytest.mark.slow)
    for example, first in {
        "gan": "torchrun",
        "contrastive": "mpirun",
        "wide_features": "",
        "metrics": "horovodrun --mpi",
        "dict_batches": "",
        "schedule": "",
        "streams": "",
        "less_memory": "",
        "predictions": "",
    }.items()
    for launcher in LAUNCHES
    if launcher != "python"
]


def said(example: str, launcher: str, *words: str, ranks: int | None = None) -> str:
    """All that an example says, which must end well."""
    if launcher.startswith("horovodrun"):
        pytest.importorskip("horovod", reason="Horovod is not installed")
    launch, usual = LAUNCHES[launcher]
    ended = run(launch(ranks or usual, str(EXAMPLES / f"{example}.py"), *words))
    assert ended.code == 0, ended.output
    return ended.output


@functools.cache
def last_words(example: str, launcher: str) -> str:
    """What an example says at the end, without how many ranks it had."""
    (words,) = re.findall(rf"{LAUNCHES[launcher][1]} rank\(s\): (.*)", said(example, launcher))
    return words


@pytest.mark.parametrize(("example", "launcher"), EXAMPLE_LAUNCHES)
def test_an_example_ends_alike_under_every_launcher(example, launcher):
    if example == "metrics":
        pytest.importorskip("torchmetrics", reason="needs torchmetrics")
    assert last_words(example, launcher) == last_words(example, "python")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begins", "ends"),
    [
        ("horovodrun --mpi", "torchrun"),
        ("horovodrun --gloo", "torchrun"),
        ("torchrun", "horovodrun --mpi"),
        ("horovodrun --mpi", "mpirun"),
        ("mpirun", "torchrun"),
    ],
)
def test_a_run_goes_on_under_another_launcher_to_the_same_losses(tmp_path: Path, begins, ends):
    stopped = said("change_engine", begins, str(tmp_path), "--stop-after", "40", ranks=2)
    assert f"backend {ENGINES[begins]}: at step 40" in stopped
    moved = said("change_engine", ends, str(tmp_path), ranks=2)
    assert f"backend {ENGINES[ends]}: at step 120" in moved
    assert losses(moved) == pytest.approx(losses(unmoved()), rel=1e-9)
    assert losses(moved) != pytest.approx(losses(stopped), rel=0.1)


ENGINES = {"torchrun": "torch", "mpirun": "mpi", "horovodrun --mpi": "horovod", "horovodrun --gloo": "horovod"}


@functools.cache
def unmoved() -> str:
    """The run that one launcher begins and ends."""
    with tempfile.TemporaryDirectory() as folder:
        return said("change_engine", "torchrun", folder, ranks=2)


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"evaluated loss (\S+)", output)]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHES)
def test_an_autoencoder_learns_by_its_methods(launcher):
    output = said("vae", launcher)
    before, after = map(float, re.search(r"from (\d+\.\d) to (\d+\.\d) nats", output).groups())
    assert before > 40
    assert after < 26


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHES)
def test_the_best_of_a_run_is_kept_and_predicts(tmp_path: Path, launcher):
    output = said("best_of_a_run", launcher, str(tmp_path))
    assert int(re.search(r"ended after (\d+) epochs: accuracy has not been better", output)[1]) < 40
    best, predicted = re.search(r"best (\S+), of its predictions (\S+) right", output).groups()
    assert best == predicted
    assert float(best) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHES)
def test_a_logger_of_ones_own_hears_of_all(tmp_path: Path, launcher):
    output = said("own_logger", launcher, str(tmp_path / "new" / "losses.csv"))
    first, *others, last = map(float, re.search(r"21 lines, evaluated losses (.*)", output)[1].split(", "))
    assert len(others) == 1
    assert last < first < 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "horovodrun --mpi"])
def test_ways_over_a_slow_network_send_less_and_learn(launcher):
    output = said("slow_network", launcher)
    found = re.findall(r"rank\(s\): (\S+) sends (\S+) bytes a step, accuracy (\S+)", output)
    sent = {way: float(count.replace(",", "")) for way, count, _ in found}
    assert all(float(right) > 0.9 for *_, right in found)
    assert sent["int8"] < sent["plain"] / 2
    assert max(sent["powersgd:2"], sent["local-sgd:8"], sent["diloco:20"]) < sent["plain"] / 6


@pytest.mark.slow
def test_a_slow_input_is_found_and_repaired(tmp_path: Path):
    flags = ["--task", "slow_input:Slow", "--max-steps", "40", "--profile", "20:30"]
    verdict, speed = {}, {}
    for name, repair in (("slow", []), ("repaired", ["--workers", "2"])):
        run_dir = tmp_path / name
        ended = run(torchrun(2, "-m", "hvdtrain", *flags, *repair, "--run-dir", str(run_dir)), cwd=EXAMPLES)
        assert ended.code == 0, ended.output
        verdict[name] = json.loads((run_dir / "profile" / "verdict.json").read_text())
        speed[name] = json.loads((run_dir / "summary.json").read_text())["samples_per_second"]
    assert "input binds the step" in json.dumps(verdict["slow"])
    assert speed["repaired"] > speed["slow"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_mpi_group_alone(ranks):
    ended = run(mpirun(ranks, str(EXAMPLES / "mpi_group.py")))
    assert ended.code == 0, ended.output
    assert float(re.search(rf"{ranks} rank\(s\): loss (\S+)", ended.output)[1]) < 1e-3


@pytest.mark.slow
def test_detection_learns():
    pytest.importorskip("torchvision", reason="needs torchvision", exc_type=(ImportError, RuntimeError))
    ended = run(torchrun(2, str(EXAMPLES / "detection.py")))
    assert ended.code == 0, ended.output
    assert float(re.search(r"train loss (\d\.\d+)", ended.output)[1]) < 0.6


def test_spawn_from_script():
    ended = run([sys.executable, str(EXAMPLES / "spawn_from_script.py")])
    assert ended.code == 0, ended.output
    assert ended.output.strip() == "[30.0, 30.0, 30.0]"


def test_a_custom_task_runs_as_a_script_and_by_name(tmp_path: Path):
    ended = run([sys.executable, str(EXAMPLES / "custom_task.py")])
    assert ended.code == 0, ended.output
    assert "within_0.1" in ended.output
    flags = ["--task", "custom_task:Circle", "--task.samples", "500", "--epochs", "2", "--run-dir", str(tmp_path)]
    ended = run(torchrun(2, "-m", "hvdtrain", *flags), cwd=EXAMPLES)
    assert ended.code == 0, ended.output
    assert "eval distance" in ended.output


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_backend_of_ones_own_passes_the_conformance_suite(tmp_path: Path, ranks):
    package = tmp_path / "package"
    about = package / "own_backend-1.0.dist-info"  # what pip writes for a package that registers it
    about.mkdir(parents=True)
    shutil.copy(EXAMPLES / "own_backend.py", package)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: own-backend\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[hvdtrain.backends]\ngloo = own_backend:GlooBackend\n")
    path = os.pathsep.join([str(package), str(ROOT), os.environ.get("PYTHONPATH", "")])
    how = ["--backend", "gloo", "-q", "--log-dir", str(tmp_path / "logs")]
    ended = run(torchrun(ranks, "-m", "hvdtrain.testing", *how), timeout_s=1800, PYTHONPATH=path)
    shown = "\n\n".join([ended.output, *(log.read_text()[-6000:] for log in sorted((tmp_path / "logs").iterdir()))])
    assert ended.code == 0, shown


def test_every_example_is_run_here():
    tried = {
        "own_loop",
        "own_loop_resume",
        "one_process",
        "data_parallel",
        "mnist_files",
        "spawn_from_script",
        "custom_task",
        "wide_features",
        "gan",
        "contrastive",
        "detection",
        "metrics",
        "dict_batches",
        "vae",
        "best_of_a_run",
        "own_backend",
        "schedule",
        "own_logger",
        "streams",
        "slow_network",
        "less_memory",
        "slow_input",
        "mpi_group",
        "predictions",
        "change_engine",
    }
    assert {file.stem for file in EXAMPLES.glob("*.py")} == tried
