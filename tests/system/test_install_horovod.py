"""`hvdtrain install-horovod` as a user meets it; the real builds are slow and need PyPI."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
import torch
from launching import HOROVOD_MPIRUN, run

from hvdtrain.backends.hvd.stamp import installed, why_not
from hvdtrain.horovod_build.probe import find_compiler

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import os, torch, horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.tensor([hvd.rank() + 1.0]), op=hvd.Sum).item()
print("RANK", hvd.rank(), "of", hvd.size(), "sum", total, "launcher", os.environ.get("HVDTRAIN_LAUNCHER"), flush=True)
hvd.shutdown()
"""
needs_compiler = pytest.mark.skipif(isinstance(find_compiler(os.environ), str), reason="needs a C++ compiler")


def command(*words, python=sys.executable, cwd=ROOT, limit_s=60.0, **variables):
    return subprocess.run(
        [str(python), "-m", "hvdtrain", "install-horovod", *map(str, words)],
        cwd=cwd, capture_output=True, text=True, timeout=limit_s, check=False, env={**os.environ, **variables},
    )  # fmt: skip


def test_help_names_every_flag_and_variable():
    done = command("--help")
    assert done.returncode == 0
    for word in ("--[no-]mpi", "--[no-]gloo", "--nccl auto|on|off", "--cuda-arch", "--source", "--jobs", "--wheel-dir",
                 "--[no-]force", "--[no-]verify", "--[no-]dry-run", "--[no-]check", "MPICXX", "HVDTRAIN_CACHE"):  # fmt: skip
        assert word in done.stdout, word


def test_an_unknown_flag_is_refused_with_the_nearest():
    done = command("--nccll", "off")
    assert done.returncode == 2
    assert "unknown flag '--nccll'; did you mean '--nccl'?" in done.stderr


@needs_compiler
def test_a_dry_run_shows_the_plan_and_does_nothing(tmp_path):
    done = command("--dry-run", "--nccl", "off", HVDTRAIN_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "Horovod   0.28.1 from PyPI" in done.stdout
    assert f"torch     {torch.__version__}" in done.stdout
    assert "HOROVOD_WITH_PYTORCH=1" in done.stdout
    assert "to do     build and install" in done.stdout
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_it_ends_at_once_and_names_the_package(tmp_path):
    (tmp_path / "bin").mkdir()
    began = time.monotonic()
    done = command("--force", PATH=str(tmp_path / "bin"), CXX="", HVDTRAIN_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert time.monotonic() - began < 20
    assert "missing:\n  - a C++ compiler (none of c++, g++, clang++ is on PATH): apt install g++" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_check_says_what_is_installed_and_whether_it_can_be_used():
    done = command("--check")
    assert done.returncode == (1 if why_not() else 0)
    assert (f"cannot be used: {why_not()}" if why_not() else "can be used") in done.stdout
    found = installed()
    if found is not None:
        assert f"Horovod in {found.folder}" in done.stdout


@needs_compiler
def test_what_is_installed_already_is_left_alone_within_seconds():
    found = installed()
    if found is None or found.stamp is None or why_not() or found.stamp.source != "PyPI":
        pytest.skip("no Horovod built by hvdtrain in this environment")
    mpi, nccl = ("--mpi" if found.stamp.mpi else "--no-mpi"), ("on" if found.stamp.nccl else "off")
    planned = command("--dry-run", mpi, "--nccl", nccl)
    if planned.returncode or "nothing to do" not in planned.stdout:  # never change the environment of the tests
        pytest.skip(f"another Horovod would be built in these surroundings: {planned.stdout}{planned.stderr}")
    before = (found.folder / "__init__.py").stat().st_mtime_ns
    done = command(mpi, "--nccl", nccl, "--verify")
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert (found.folder / "__init__.py").stat().st_mtime_ns == before


def test_a_source_that_is_not_there_is_refused(tmp_path):
    done = command("--source", tmp_path / "nothing", HVDTRAIN_CACHE=str(tmp_path / "cache"))
    assert done.returncode in (1, 2)
    assert "is neither a file nor a folder" in done.stderr or "missing:" in done.stderr


def test_the_command_loads_no_torch():
    code = "import sys, hvdtrain.cli.install_horovod; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60, cwd=ROOT).returncode == 0


def environment(folder: Path) -> Path:
    """A fresh environment that sees this one's packages but has no Horovod of its own; its Python."""
    venv.create(folder, with_pip=True)
    packages = next((folder / "lib").glob("python3.*/site-packages"))
    (packages / "of_the_tests.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    return folder / "bin" / "python"


def horovodrun(python: Path, *words: str, limit_s: float = 120.0):
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(python.parent / "horovodrun"), *words],
        capture_output=True, text=True, timeout=limit_s, check=False, env=variables, cwd=python.parent,
    )  # fmt: skip


def built_or_skip(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode and "could not be fetched" in done.stderr:
        pytest.skip(f"no way to PyPI: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr


def running_below(folder: Path) -> list[str]:
    """Command lines of processes that work in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                    found.append((entry / "cmdline").read_bytes().decode())
            except OSError:
                continue
    return found


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(3600)
def test_a_fresh_environment_gets_a_horovod_that_works_and_the_next_one_the_same_wheel(tmp_path):
    cache = {"HVDTRAIN_CACHE": str(tmp_path / "cache")}
    first = environment(tmp_path / "first")
    done = command("--nccl", "off", python=first, limit_s=3000, **cache)
    built_or_skip(done)
    assert re.search(r"built in \d+ s: .*\.whl", done.stderr)
    assert "compiling" in done.stderr
    assert "two ranks tried under" in done.stdout

    (tmp_path / "rank.py").write_text(RANK)
    with_mpi = "MPI (" in done.stdout
    for options in [["--gloo"], *([["--mpi"], ["--mpi", "-H", "localhost:2"], ["--verbose"]] if with_mpi else [])]:
        ran = horovodrun(first, "-np", "2", *options, "--disable-cache", str(first), str(tmp_path / "rank.py"))
        assert ran.returncode == 0, (options, ran.stdout, ran.stderr)
        for rank in (0, 1):
            assert re.search(rf"RANK {rank} of 2 sum 3\.0", ran.stdout.replace("\n", " ")), (options, ran.stdout)
        if "--mpi" in options:
            assert "launcher horovodrun" in ran.stdout
    assert "[X] PyTorch" in horovodrun(first, "--check-build").stdout

    again = command("--nccl", "off", python=first, **cache)
    assert "nothing to do" in again.stdout

    second = environment(tmp_path / "second")
    began = time.monotonic()
    done = command("--nccl", "off", python=second, limit_s=300, **cache)
    assert done.returncode == 0, done.stderr
    assert "the wheel is there" in done.stderr
    assert time.monotonic() - began < 90
    shutil.rmtree(tmp_path / "first")  # the second must not lean on it
    ran = horovodrun(second, "-np", "2", "--disable-cache", str(second), str(tmp_path / "rank.py"))
    assert "sum 3.0" in ran.stdout, ran.stderr

    (wheel,) = (tmp_path / "cache" / "wheels").glob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[:-100])
    third = environment(tmp_path / "third")
    process = subprocess.Popen(
        [str(third), "-m", "hvdtrain", "install-horovod", "--nccl", "off"],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **cache, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "compiling" in line:
            break
    assert "its checksum is wrong" in said
    assert "is built anew" in said
    process.send_signal(signal.SIGTERM)  # in the middle of the build: nothing of it may go on
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    process.stderr.close()
    assert running_below(tmp_path) == []
    assert not list(tmp_path.glob("hvdtrain-horovod-*"))


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(3600)
def test_a_horovod_without_mpi_works_over_gloo_and_is_refused_under_mpirun(tmp_path):
    python = environment(tmp_path / "env")
    done = command("--no-mpi", "--nccl", "off", python=python, limit_s=3000, HVDTRAIN_CACHE=str(tmp_path / "cache"))
    built_or_skip(done)
    assert "with Gloo, two ranks tried under horovodrun --gloo" in done.stdout
    job = ["-m", "hvdtrain", "--backend", "horovod", "--epochs", "1", "--run-dir", str(tmp_path / "run")]
    ran = horovodrun(python, "-np", "2", "--disable-cache", str(python), *job)
    assert ran.returncode == 0, ran.stderr
    assert "Horovod 0.28.1, Gloo" in ran.stdout
    mpirun = HOROVOD_MPIRUN.argv(2, *job)
    refused = run([str(python) if word == sys.executable else word for word in mpirun])
    assert refused.code != 0
    assert (
        "this Horovod was built without MPI, so mpirun cannot start it; use `horovodrun --gloo -np 2" in refused.output
    )


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(3600)
@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_a_build_with_nccl_needs_no_gpu(tmp_path):
    python = environment(tmp_path / "env")
    done = command(
        "--nccl", "on", "--cuda-arch", "8.0,9.0", python=python, limit_s=3000, HVDTRAIN_CACHE=str(tmp_path / "cache")
    )
    built_or_skip(done)
    assert "NCCL" in done.stdout
    assert "[X] NCCL" in horovodrun(python, "--check-build").stdout
    assert "for 8.0, 9.0" in command("--check", python=python).stdout
