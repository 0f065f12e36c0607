import pytest

from hvdtrain.errors import LaunchError
from hvdtrain.launch.hostlist import hosts, tasks_per_node


@pytest.mark.parametrize(
    ("compressed", "expected"),
    [
        ("a", ["a"]),
        ("a,b-1", ["a", "b-1"]),
        ("gpu[003-005,9],login1", ["gpu003", "gpu004", "gpu005", "gpu9", "login1"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
    ],
)
def test_node_lists_are_expanded_in_order(compressed, expected):
    assert hosts(compressed) == expected


@pytest.mark.parametrize("broken", ["gpu[1-", "gpu[a-b]", ",", ""])
def test_what_is_no_node_list_is_refused(broken):
    with pytest.raises(LaunchError, match="node list"):
        hosts(broken)


def test_task_counts_are_expanded():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(LaunchError, match="tasks per node"):
        tasks_per_node("two")
