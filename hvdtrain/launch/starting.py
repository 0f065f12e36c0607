"""The launchers that are on this machine, and how each starts a few ranks of a Python program here."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.launch.leftovers import without_launchers

_OWN = {  # more ranks than cores, and root in a container: right for a trial
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Starter:
    """A launcher on this machine.

    Attributes:
        name: As it is typed: "mpirun", "horovodrun --gloo".
        backend: The engine that it is for.
        words: The command, up to the number of ranks.
        between: What stands between that number and the program.
    """

    name: str
    backend: str
    words: tuple[str, ...]
    between: tuple[str, ...] = ()

    def typed(self, ranks: int) -> str:
        """As people type it, up to the program."""
        number = (
            "" if self.backend == "local" else f" {'--nproc-per-node' if self.name == 'torchrun' else '-np'} {ranks}"
        )
        return " ".join([f"{self.name}{number}", *self.between])

    def command(self, ranks: int, program: Sequence[str]) -> list[str]:
        """Start so many ranks of ``python PROGRAM``."""
        number = [] if self.backend == "local" else [str(ranks)]
        python = [] if self.name == "torchrun" else [sys.executable]
        return [*self.words, *number, *self.between, *python, *program]


def starters(*, gloo: bool, mpi: bool) -> list[Starter]:
    """Those that are here, one process first.

    Args:
        gloo: Whether there is a Horovod with Gloo.
        mpi: Whether there is one with MPI.
    """
    torchrun = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    )
    found = [
        Starter(name="python", backend="local", words=()),
        Starter(name="torchrun", backend="torch", words=(*torchrun, "--nproc-per-node")),
    ]
    mpirun, horovodrun = program("mpirun"), program("horovodrun")
    if mpirun is not None:
        found.append(Starter(name="mpirun", backend="mpi", words=(mpirun, "-np"), between=("--bind-to", "none")))
    for carrier, has in (("--gloo", gloo), ("--mpi", mpi)):
        if horovodrun is not None and has:
            words = (horovodrun, carrier, "-np")
            found.append(Starter(name=f"horovodrun {carrier}", backend="horovod", words=words))
    return found


def program(name: str) -> str | None:
    """A program on PATH, else of this Python's environment."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sysconfig.get_path("scripts"))))


def surroundings(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a trial: without what a launcher around this process has said, and with leave to oversubscribe."""
    own = os.pathsep.join([environment.get("PATH", ""), os.path.dirname(sys.executable)])
    return {**_OWN, **without_launchers(environment), "PATH": own}  # horovodrun looks for python and mpirun
