"""What the kernel shows of the processes on this host: who is still there, who descends from whom, who listens to a signal.

Where ``/proc`` cannot be read, there is nobody.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path


def started(pid: int) -> str:
    """When a process began, in the kernel's ticks: with its pid, what tells it from a later one; "" if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def lives(pid: int, began: str) -> bool:
    """Whether a process that was `started` at ``began`` is still there."""
    return began != "" and started(pid) == began


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    try:
        found = re.search(r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return found is not None and bool(int(found[1], 16) >> (number - 1) & 1)


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on, in no order."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            try:
                parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(name))
    found, ahead = [], [pid]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found
