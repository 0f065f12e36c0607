"""When waiting must give way to computing."""

from __future__ import annotations

import os

import pytest

from hvdtrain.launch import cores
from hvdtrain.launch.launchers import may_join_by_mpi
from hvdtrain.topology import Topology


def node_of(ranks: int) -> Topology:
    return Topology(rank=0, world_size=ranks, local_rank=0, local_world_size=ranks, node_rank=0, num_nodes=1)


@pytest.mark.parametrize(
    ("there", "mine", "ranks", "yields"),
    [(8, 8, 4, False), (8, 8, 5, True), (8, 2, 4, False), (8, 1, 1, True), (1, 1, 1, True), (2, 2, 1, False)],
)
def test_it_gives_way_where_threads_outnumber_the_cores_or_a_rank_has_only_one(monkeypatch, there, mine, ranks, yields):
    monkeypatch.setattr(os, "cpu_count", lambda: there)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(mine)))
    assert cores.bound_to_one_core() is (mine == 1 and there > 1)
    assert cores.yielding(node_of(ranks)) == ({"OMPI_MCA_mpi_yield_when_idle": "1"} if yields else {})


def test_only_these_launchers_may_join_ranks_by_mpi():
    names = ("none", "spawn", "torchrun", "mpirun", "horovodrun", "srun", "environment", "pytorchjob")
    assert [name for name in names if may_join_by_mpi(name)] == ["mpirun", "horovodrun", "srun"]
