"""The batch scripts of examples/slurm on a real Slurm: they train over two nodes, and go on after a signal and a requeue."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT
from launching import missing as unavailable
from slurm import Slurm, cluster, missing

SCRIPTS = {"mpi": "mpi", "torch": "torch", "mpirun": "mpi", "horovodrun": "horovod"}
reason = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason), reason=reason)]


@pytest.fixture(scope="module")
def slurm():
    with cluster() as running:
        yield running


def submit(slurm: Slurm, script: str, folder: Path, *flags: str) -> str:
    backend = SCRIPTS[script]
    why = unavailable("horovodrun-gloo" if script == "horovodrun" else "mpirun", backend)
    if why:
        pytest.skip(why)
    if script == "mpi" and "pmix" not in slurm.ask("srun", "--mpi=list"):
        pytest.skip("this Slurm has no PMIx")
    size = ["--ntasks-per-node=1", "--cpus-per-task=1", f"--chdir={folder}", f"--output={folder}/out"]
    file = str(ROOT / "examples" / "slurm" / f"{script}.sbatch")
    settings = {"PYTHON": sys.executable, "RUN_DIR": str(folder / "run"), "HVDTRAIN_RENDEZVOUS_DIR": str(folder)}
    return slurm.submit(*size, file, *flags, **settings)


def wait_for(slurm: Slurm, job: str, folder: Path, true, limit_s: float = 150) -> dict[str, str]:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        state = slurm.state(job)
        if true(state):
            return state
        time.sleep(0.5)
    said = (folder / "out").read_text(errors="replace") if (folder / "out").exists() else "nothing"
    pytest.fail(f"after {limit_s} s the job is {state}\n{said[-5000:]}")


def ended(state: dict[str, str]) -> bool:
    return state["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_trains_over_two_nodes(slurm, tmp_path, script):
    job = submit(slurm, script, tmp_path, "--epochs", "2")
    state = wait_for(slurm, job, tmp_path, ended)
    said = (tmp_path / "out").read_text(errors="replace")
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["backend"], summary["world_size"]) == (SCRIPTS[script], 2)
    assert summary["eval_accuracy"] > 0.9


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_that_is_told_to_go_saves_is_queued_again_and_goes_on(slurm, tmp_path, script):
    job = submit(slurm, script, tmp_path, "--epochs", "40", "--log-every", "1")
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(slurm, job, tmp_path, lambda _: log.exists() and log.read_text().count("\n") > 30)
    batch = ["--batch"] if script in ("mpirun", "horovodrun") else []
    slurm.ask("scancel", *batch, "--signal=USR1", job)
    wait_for(slurm, job, tmp_path, lambda state: state["Restarts"] == "1" or ended(state))
    # Slurm holds a job that was queued again back for a while; a preempted one likewise.
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert saved, (tmp_path / "out").read_text(errors="replace")
    slurm.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    state = wait_for(slurm, job, tmp_path, ended, limit_s=240)
    said = (tmp_path / "out").read_text(errors="replace")
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), said
    steps = [json.loads(line).get("step") for line in log.read_text().splitlines()]
    trained = [step for step in steps if step is not None]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] >= max(trained) > 30
