"""Slurm's compressed lists: host names as ``gpu[003-005,9],login1`` and task counts as ``2(x2),1``."""

from __future__ import annotations

import itertools
import re

from hvdtrain.errors import LaunchError
from hvdtrain.settings.wording import shown

_ITEM = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")
_RANGES = re.compile(r"[0-9]{1,12}(-[0-9]{1,12})?(,[0-9]{1,12}(-[0-9]{1,12})?)*")
_COUNT = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")
_MOST = 1_000_000  # hosts or tasks; far above any machine, so that a damaged list cannot fill the memory


def hosts(compressed: str) -> list[str]:
    """Expand a node list, in its order.

    Args:
        compressed: Such as ``gpu[003-005,9],login1``; leading zeros are kept, several brackets may be in one name.

    Returns:
        Such as ``["gpu003", "gpu004", "gpu005", "gpu9", "login1"]``.

    Raises:
        LaunchError: It is not a node list.
    """
    found: list[str] = []
    position = 0
    while match := _ITEM.match(compressed, position):
        found += _expand(match.group(), compressed)
        position = match.end()
        if position == len(compressed):
            return found
        if compressed[position] != ",":
            break
        position += 1
    raise LaunchError(f"cannot read the node list {shown(compressed)}; expected one such as node[01-04,7],other")


def tasks_per_node(compressed: str) -> list[int]:
    """Expand task counts: ``2(x3),1`` is [2, 2, 2, 1].

    Raises:
        LaunchError: It is not such a list.
    """
    found: list[int] = []
    for part in compressed.split(","):
        match = _COUNT.fullmatch(part)
        if match is None or len(found) + int(match[2] or 1) > _MOST:
            raise LaunchError(f"cannot read the tasks per node {shown(compressed)}; expected a list such as 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _expand(item: str, whole: str) -> list[str]:
    """``a[1-2]b[0,3]`` is a1b0, a1b3, a2b0, a2b3: the last bracket turns fastest, as in Slurm."""
    pieces: list[list[str]] = []
    total = 1
    for piece in re.split(r"(\[[^\]]*\])", item):
        pieces.append(_numbers(piece[1:-1], whole) if piece.startswith("[") else [piece])
        total *= len(pieces[-1])
        if total > _MOST:
            raise LaunchError(f"the node list {shown(whole)} names more than {_MOST} hosts")
    return ["".join(parts) for parts in itertools.product(*pieces)]


def _numbers(ranges: str, whole: str) -> list[str]:
    if not _RANGES.fullmatch(ranges):
        raise LaunchError(
            f"cannot read {shown(ranges)} in the node list {shown(whole)}; expected ranges such as [01-04,7]"
        )
    found: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if not low <= high < low + _MOST:
            raise LaunchError(f"cannot read the range {shown(part)} in the node list {shown(whole)}")
        found += [f"{number:0{len(first)}d}" for number in range(low, high + 1)]
    return found
