from __future__ import annotations

import pytest

from hvdtrain.errors import LaunchError
from hvdtrain.launch.hostlist import hosts, tasks_per_node


# The expansions are those of `scontrol show hostnames` (Slurm 22.05).
@pytest.mark.parametrize(
    ("compressed", "expected"),
    [
        ("login1", ["login1"]),
        ("a,b", ["a", "b"]),
        ("gpu[003-005,9],login1", ["gpu003", "gpu004", "gpu005", "gpu9", "login1"]),
        ("node[08-11]", ["node08", "node09", "node10", "node11"]),
        ("node[99-101]", ["node99", "node100", "node101"]),
        ("rack[1-2]n[0,2]", ["rack1n0", "rack1n2", "rack2n0", "rack2n2"]),
        ("gpu[1-2].site.example", ["gpu1.site.example", "gpu2.site.example"]),
        ("a-b[3],a-c", ["a-b3", "a-c"]),
        ("b[2],a[1]", ["b2", "a1"]),
    ],
)
def test_node_lists_expand_in_order_with_leading_zeros(compressed: str, expected: list[str]) -> None:
    assert hosts(compressed) == expected


@pytest.mark.parametrize(
    "text", ["", ",", "a,", ",a", "a[1-2", "a]", "a[]", "a[1-]", "a[x]", "gpu[a-b]", "a[2-1]", "a b", "a[1-9999999]"]
)
def test_what_is_no_node_list_is_refused_naming_it(text: str) -> None:
    with pytest.raises(LaunchError, match="node list"):
        hosts(text)


def test_a_node_list_cannot_fill_the_memory() -> None:
    with pytest.raises(LaunchError, match="more than"):
        hosts("a[0-9999][0-9999][0-9999]")


@pytest.mark.parametrize(
    ("compressed", "expected"),
    [("4", [4]), ("2(x2),1", [2, 2, 1]), ("3,1(x2)", [3, 1, 1]), ("1(x3)", [1, 1, 1]), ("3,1", [3, 1])],
)
def test_tasks_per_node_expand(compressed: str, expected: list[int]) -> None:
    assert tasks_per_node(compressed) == expected


@pytest.mark.parametrize("text", ["", "two", "2,", "x2", "2(2)", "2(x)", "-1", "2 (x2)", "1(x99999999)"])
def test_what_is_no_task_list_is_refused_naming_it(text: str) -> None:
    with pytest.raises(LaunchError, match="tasks per node"):
        tasks_per_node(text)
