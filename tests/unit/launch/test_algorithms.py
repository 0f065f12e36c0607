"""What MPI and NCCL are told for each family of algorithms; that it takes effect is seen on the wire in tests/cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdtrain.backends.local import LocalBackend
from hvdtrain.errors import ConfigError
from hvdtrain.launch import algorithms
from hvdtrain.launch.detect import detect
from hvdtrain.settings.config import TrainConfig
from hvdtrain.topology import Topology

RULES = "OMPI_MCA_coll_tuned_dynamic_rules_filename"


def world(size: int, nodes: int = 1) -> Topology:
    local = size // nodes
    return Topology(rank=0, world_size=size, local_rank=0, local_world_size=local, node_rank=0, num_nodes=nodes)


@pytest.fixture(autouse=True)
def _untuned(monkeypatch):
    for name in ("NCCL_ALGO", "OMPI_MCA_coll_tuned_use_dynamic_rules", "MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM"):
        monkeypatch.delenv(name, raising=False)


def rules(family: str, topology: Topology) -> str:
    with algorithms.mpi(family, topology) as told:
        file = Path(told[RULES])
        text = file.read_text()
    assert not file.exists()
    return text


def test_open_mpi_gets_the_number_of_the_algorithm_for_this_world_and_long_messages():
    assert rules("ring", world(6)).split() == ["1", "2", "1", "6", "2", "0", "0", "0", "0", "16384", "4", "0", "0"]
    assert rules("rabenseifner", world(8)).split()[-4:] == ["16384", "6", "0", "0"]
    assert rules("tree", world(8)).split() == ["1", "2", "1", "8", "1", "0", "3", "0", "0"]


def test_mpich_gets_its_own_names():
    with algorithms.mpi("tree", world(4)) as told:
        assert told["MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM"] == "recursive_doubling"


@pytest.mark.parametrize(
    ("size", "nodes", "told"), [(4, 2, False), (2, 2, False), (3, 1, False), (3, 3, True), (6, 2, True)]
)
def test_without_a_choice_only_odd_worlds_between_nodes_get_a_ring(size, nodes, told):
    with algorithms.mpi("auto", world(size, nodes)) as values:
        assert (RULES in values) is told
        assert "MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM" not in values


def test_what_the_user_tunes_is_left_to_the_user(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_coll_tuned_allreduce_algorithm", "5")
    with algorithms.mpi("auto", world(3, 3)) as values:
        assert values == {}
    monkeypatch.setenv("OMPI_MCA_coll_tuned_use_dynamic_rules", "0")
    with (
        pytest.raises(ConfigError, match="OMPI_MCA_coll_tuned_use_dynamic_rules=0 is set"),
        algorithms.mpi("ring", world(3)),
    ):
        pass


def test_nccl_takes_rings_and_trees():
    assert algorithms.nccl("auto") == {}
    assert algorithms.nccl("ring") == {"NCCL_ALGO": "Ring"}
    assert algorithms.nccl("hierarchical") == {"NCCL_ALGO": "Tree"}
    with pytest.raises(
        ConfigError, match="rabenseifner: NCCL cannot be told to; it can do auto, ring, tree, hierarchical"
    ):
        algorithms.nccl("rabenseifner")


@pytest.mark.parametrize(
    ("library", "family", "works"),
    [
        ("Open MPI v5.0.11", "ring", True),
        ("Open MPI v4.1.4", "rabenseifner", True),
        ("MPICH 4.0.2", "ring", False),
        ("MPICH 5.0.1", "ring", False),
        ("MPICH 4.0.2", "rabenseifner", True),
        ("Intel(R) MPI Library 2021.14", "ring", False),
        ("Intel(R) MPI Library 2021.14", "hierarchical", True),
    ],
)
def test_a_library_that_was_not_told_is_refused(library, family, works):
    if works:
        algorithms.check_mpi(family, library)
    else:
        with pytest.raises(ConfigError, match="it can do auto"):
            algorithms.check_mpi(family, library)


def test_one_process_has_nothing_to_choose():
    with pytest.raises(ConfigError, match=r"--all-reduce ring: backend local.* it can do auto"):
        LocalBackend(detect({}), device="cpu", all_reduce="ring")


def test_a_family_that_nobody_knows_is_refused_with_the_names():
    with pytest.raises(ConfigError, match="ring"):
        TrainConfig(all_reduce="rings")
