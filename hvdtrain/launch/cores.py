"""How many cores a rank has, and what is said to a library whose thread waits on one of them."""

from __future__ import annotations

import os

from hvdtrain.topology import Topology


def bound_to_one_core() -> bool:
    """Whether this process may use one core only, of a machine that has more."""
    return len(os.sched_getaffinity(0)) < 2 <= (os.cpu_count() or 1)


def yielding(topology: Topology) -> dict[str, str]:
    """The variable that lets Open MPI's waits give way, where ranks and their waiting threads outnumber the cores.

    Each rank has a thread that waits inside MPI beside the one that computes: it must not take the core from that.
    """
    if bound_to_one_core() or 2 * topology.local_world_size > (os.cpu_count() or 1):
        return {"OMPI_MCA_mpi_yield_when_idle": "1"}
    return {}
