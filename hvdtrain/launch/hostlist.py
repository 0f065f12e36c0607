"""Slurm's compressed lists: ``gpu[003-005,9],login1`` and ``2(x2),1``."""

from __future__ import annotations

import re

from hvdtrain.errors import LaunchError

_ITEM = re.compile(r"[^,\[]*(?:\[[^\]]*\][^,\[]*)*")


def hosts(compressed: str) -> list[str]:
    """Expand a Slurm node list, in its order.

    Raises:
        LaunchError: It is not one.
    """
    found: list[str] = []
    position = 0
    while position < len(compressed):
        match = _ITEM.match(compressed, position)
        if match is None or not match.group() or (match.end() < len(compressed) and compressed[match.end()] != ","):
            raise LaunchError(f"cannot read the node list {compressed!r}; expected something like node[01-04,7],other")
        found += _expand(match.group())
        position = match.end() + 1
    return found


def tasks_per_node(compressed: str) -> list[int]:
    """Expand SLURM_TASKS_PER_NODE: ``2(x3),1`` is [2, 2, 2, 1].

    Raises:
        LaunchError: It is not such a list.
    """
    found: list[int] = []
    for part in compressed.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise LaunchError(f"cannot read the task counts {compressed!r}; expected something like 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _expand(item: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", item)
    if match is None:
        return [item]
    numbers: list[str] = []
    for part in match[1].split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise LaunchError(f"cannot read the node list {item!r}")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last if dash else first) + 1)]
    tails = _expand(item[match.end() :])
    return [f"{item[: match.start()]}{number}{tail}" for number in numbers for tail in tails]
