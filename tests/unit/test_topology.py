from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from hvdtrain.errors import LaunchError
from hvdtrain.topology import Topology

FIRST_OF_FIVE = Topology(
    rank=0, world_size=5, local_rank=0, local_world_size=3, node_rank=0, num_nodes=2, launcher="srun"
)


def test_single_is_a_world_of_one_without_launcher() -> None:
    expected = Topology(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, num_nodes=1)
    assert Topology.single() == expected
    assert Topology.single().launcher == "none"


def test_facts_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        FIRST_OF_FIVE.rank = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 5}, "rank=5 does not fit world_size=5; it must be from 0 to 4"),
        ({"rank": -1}, "rank=-1 does not fit"),
        ({"world_size": 0}, "world_size=0; it must be at least 1"),
        ({"local_rank": 3}, "local_rank=3 does not fit local_world_size=3"),
        ({"local_world_size": 0}, "local_world_size=0; it must be at least 1"),
        ({"local_world_size": 6}, "local_world_size=6 is larger than world_size=5"),
        ({"node_rank": 2}, "node_rank=2 does not fit num_nodes=2"),
        ({"num_nodes": 0}, "num_nodes=0; it must be at least 1"),
        ({"num_nodes": 1}, "num_nodes=1 does not fit local_world_size=3 of world_size=5"),
        ({"num_nodes": 4}, "num_nodes=4 does not fit local_world_size=3 of world_size=5"),
        ({"local_world_size": 5}, "num_nodes=2 does not fit local_world_size=5 of world_size=5"),
    ],
)
def test_contradictions_are_refused_with_the_numbers_and_the_launcher(changes: dict[str, int], message: str) -> None:
    with pytest.raises(LaunchError, match=r"^srun: ") as caught:
        replace(FIRST_OF_FIVE, **changes)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_uneven_nodes_are_accepted() -> None:
    assert replace(FIRST_OF_FIVE, num_nodes=3).num_nodes == 3
    assert replace(FIRST_OF_FIVE, rank=4, local_rank=1, local_world_size=2, node_rank=1).rank == 4
