"""The mpi backend and process group on the distribution's Open MPI and MPICH, beside the one in this environment."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import missing, run

pytestmark = pytest.mark.slow
RANKS = Path(__file__).resolve().parents[1] / "ranks"


@dataclass(frozen=True)
class Library:
    """An MPI of the distribution: how to start ranks with it, and how mpi4py is told to load it."""

    name: str
    mpirun: str
    library: str
    said: str

    def argv(self, ranks: int, *argv: str) -> list[str]:
        words = ["--oversubscribe", "--bind-to", "none"] if "openmpi" in self.mpirun else []
        return [self.mpirun, *words, "-np", str(ranks), sys.executable, *argv]

    def environment(self, folder: Path) -> dict[str, str]:
        if "openmpi" in self.mpirun:
            return {"MPI4PY_LIBMPI": self.library}
        folder.mkdir(exist_ok=True)  # Debian calls it libmpich.so.12; the name of the common ABI is libmpi.so.12
        (folder / "libmpi.so.12").symlink_to(self.library)
        return {"LD_LIBRARY_PATH": str(folder), "MPI4PY_MPIABI": "mpich"}


LIBRARIES = [
    Library("Open MPI 4", "mpirun.openmpi", "/usr/lib/x86_64-linux-gnu/libmpi.so.40", "Open MPI v4"),
    Library("MPICH 4", "mpirun.mpich", "/usr/lib/x86_64-linux-gnu/libmpich.so.12", "MPICH 4"),
]


@pytest.fixture(params=LIBRARIES, ids=lambda library: library.name)
def mpi(request, tmp_path):
    library = request.param
    if missing("mpirun", "mpi"):
        pytest.skip(missing("mpirun", "mpi"))
    if shutil.which(library.mpirun) is None or not Path(library.library).exists():
        pytest.skip(f"{library.name} of Debian is not installed")
    environment = library.environment(tmp_path / "lib")
    look = "from mpi4py import MPI; print(MPI.Get_library_version(), MPI.COMM_WORLD.size)"
    ended = run(library.argv(2, "-c", look), **environment)
    assert ended.code == 0, ended.output
    assert library.said.split()[0] in ended.output
    return library, environment


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_backend_keeps_every_promise(mpi, ranks):
    library, environment = mpi
    ended = run(library.argv(ranks, "-m", "hvdtrain.testing", "--backend", "mpi"), timeout_s=420, **environment)
    assert ended.code == 0, ended.output[-8000:]
    assert len(re.findall(r"\d+ passed", ended.output)) == ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_operation_on_every_rank(mpi, ranks):
    library, environment = mpi
    options = ["-x", "-q", "-p", "no:cacheprovider", "--color=no"]
    ended = run(library.argv(ranks, "-m", "pytest", *options, str(RANKS)), timeout_s=420, **environment)
    assert ended.code == 0, ended.output[-8000:]
    assert len(re.findall(r"\d+ passed", ended.output)) == ranks


@pytest.mark.parametrize("family", ["tree", "rabenseifner", "hierarchical", "ring"])
def test_algorithms_are_taken_or_refused(mpi, tmp_path, family):
    library, environment = mpi
    flags = ["--backend", "mpi", "--all-reduce", family, "--max-steps", "3", "--run-dir", str(tmp_path / "run")]
    ended = run(library.argv(2, "-m", "hvdtrain", *flags), **environment)
    if family == "ring" and library.said == "MPICH 4":
        assert ended.code != 0
        assert "it can do auto, tree, rabenseifner, hierarchical" in ended.output
        return
    assert ended.code == 0, ended.output
    assert "ring" not in ended.output
