"""A rank is one process: a child of it, with its environment, must not begin as the same rank again."""

from __future__ import annotations

import multiprocessing
import os

from hvdtrain.errors import LaunchError
from hvdtrain.launch.environment import given, settle

_MARK = "HVDTRAIN_RANK_IS"  # the process that is the rank, and which rank that is


def begin(rank: int, world_size: int) -> None:
    """Say that this process is the rank, to the children that it will have.

    Raises:
        LaunchError: It is such a child itself, begun by multiprocessing.
    """
    if world_size == 1:
        return
    parent = multiprocessing.parent_process()
    if parent is not None and given(_MARK) == f"{parent.pid} {rank}/{world_size}":
        raise LaunchError(
            f"this process was begun by rank {rank} (pid {parent.pid}) and cannot be that rank again: put the script's own work under "
            "`if __name__ == '__main__':`, because processes that are spawned (loader workers, too) run the rest of it first"
        )
    settle({_MARK: f"{os.getpid()} {rank}/{world_size}"})
