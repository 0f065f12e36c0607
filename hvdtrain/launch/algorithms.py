"""Families of all-reduce algorithms, by the names of the literature, and the variables by which libraries learn of them.

====================  =============================================================================================
ring                  reduce-scatter and all-gather around a ring: fewest bytes, 2(N-1) messages one after the other
tree                  recursive doubling, or a double binary tree (NCCL): fewest messages, more bytes
rabenseifner          reduce-scatter by recursive halving, all-gather by doubling (Rabenseifner 2004)
hierarchical          within each node first, then between the nodes
====================  =============================================================================================
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hvdtrain.errors import ConfigError
from hvdtrain.launch.environment import given, given_like
from hvdtrain.topology import Topology

FAMILIES = ("auto", "ring", "tree", "rabenseifner", "hierarchical")

_NCCL = {
    "ring": "Ring",
    "tree": "Tree",
    "hierarchical": "Tree",
}  # NCCL's trees join nodes, and chains the GPUs of a node
# coll_tuned_allreduce_algorithm of Open MPI 4 and 5
_OPEN_MPI = {"tree": 3, "ring": 4, "rabenseifner": 6}
_MPICH = {
    "tree": "recursive_doubling",
    "rabenseifner": "reduce_scatter_allgather",
}  # it ends on a name it does not know
_ALL_REDUCE = 2  # the number of the collective in Open MPI's rules
_LONG_BYTES = 16 * 1024  # shorter messages keep what the library thinks best: a ring of 64 ranks has 126 steps


def refuse(engine: str, wanted: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless ``engine`` can honour ``wanted``."""
    if wanted not in known:
        raise ConfigError(f"--all-reduce {wanted}: {engine} cannot be told to; it can do {', '.join(known)}")


def nccl(wanted: str) -> dict[str, str]:
    """The variables that make NCCL use a family; raises ConfigError if it has none, or other ones are set already."""
    if wanted == "auto":
        return {}
    refuse("NCCL", wanted, ("auto", *_NCCL))
    return _checked(wanted, {"NCCL_ALGO": _NCCL[wanted]})


@contextmanager
def mpi(wanted: str, topology: Topology) -> Iterator[dict[str, str]]:
    """The variables that make Open MPI or MPICH use a family, for MPI_Init within the context.

    Without a choice the library decides, but for one case: Open MPI 4 and 5 let one rank of a number that is no power of
    two send 1.9 times the bytes of a ring (docs/clusters.md), which between nodes is time.

    Args:
        wanted: One of `FAMILIES`.
        topology: Of the job.
    """
    size = topology.world_size
    if wanted == "auto" and topology.num_nodes > 1 and size & (size - 1) and not _user_tunes():
        family, forced = "ring", False
    elif wanted in ("auto", "hierarchical"):
        yield {}
        return
    else:
        family, forced = wanted, True
    descriptor, name = tempfile.mkstemp(prefix="hvdtrain-all-reduce-", suffix=".rules")
    with os.fdopen(descriptor, "w") as file:
        file.write(_rules(size, _OPEN_MPI[family], 0 if family == "tree" else _LONG_BYTES))
    values = {
        "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
        "OMPI_MCA_coll_tuned_dynamic_rules_filename": name,
    }
    if forced and family in _MPICH:
        values |= {"MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM": _MPICH[family], "MPIR_CVAR_ALLREDUCE_DEVICE_COLLECTIVE": "0"}
    try:
        yield _checked(wanted, values) if forced else values
    finally:
        Path(name).unlink(missing_ok=True)


def check_mpi(wanted: str, library: str) -> None:
    """Refuse a family that ``library``, an MPI library's name and version, knows nothing of."""
    known: tuple[str, ...] = ("auto", "hierarchical")
    if library.startswith("Open MPI"):
        known = FAMILIES
    elif library.startswith("MPICH"):
        known = ("auto", *_MPICH, "hierarchical")
    refuse(library, wanted, known)


def _user_tunes() -> bool:
    return given_like("OMPI_MCA_coll")


def _rules(size: int, algorithm: int, from_bytes: int) -> str:
    """A rules file of Open MPI's coll_tuned: for communicators of ``size`` ranks and messages of so many bytes or more."""
    lines = ["0 0 0 0"] if from_bytes else []
    lines.append(f"{from_bytes} {algorithm} 0 0")
    return "\n".join(["1", str(_ALL_REDUCE), "1", str(size), str(len(lines)), *lines, ""])


def _checked(wanted: str, values: Mapping[str, str]) -> dict[str, str]:
    for name, value in values.items():
        set_already = given(name)
        if set_already not in (None, value):
            raise ConfigError(f"--all-reduce {wanted} sets {name}={value}, but {name}={set_already} is set; drop one")
    return dict(values)
