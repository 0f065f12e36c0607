"""A rank is one process: a child of it, with its environment, must not begin as the same rank again."""

from __future__ import annotations

import multiprocessing

from hvdtrain.errors import LaunchError
from hvdtrain.launch.environment import given, settle

_MARK = "HVDTRAIN_RANK_IS"  # inherited by the processes that a rank begins


def begin(rank: int, world_size: int) -> None:
    """Say that this process is the rank, to the children that it will have.

    Raises:
        LaunchError: It is such a child itself, begun by multiprocessing.
    """
    if world_size == 1:
        return
    if _of_multiprocessing() and given(_MARK) == f"{rank}/{world_size}":
        raise LaunchError(
            f"this process was begun by rank {rank} and cannot be that rank again: put the script's own work under "
            "`if __name__ == '__main__':`, because processes that are spawned (loader workers, too) run the rest of it first"
        )
    settle({_MARK: f"{rank}/{world_size}"})


def _of_multiprocessing() -> bool:
    """Whether multiprocessing has begun this process, and runs the main script in it or something later."""
    preparing = getattr(multiprocessing.current_process(), "_inheriting", False)
    return preparing or multiprocessing.parent_process() is not None
