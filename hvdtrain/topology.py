"""Where this process stands among the ranks: facts that do not change while it runs.

Pure values: nothing is read from the environment here (that is `hvdtrain.launch.detect`).
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.errors import LaunchError


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """One process's place in a job.

    Attributes:
        rank: Number of this process in the job, from 0.
        world_size: Processes in the job.
        local_rank: Number of this process among those of the job on its node, from 0.
        local_world_size: Processes of the job on this node.
        node_rank: Number of this node among those of the job, from 0.
        num_nodes: Nodes of the job.
        launcher: What started the processes: "torchrun", "mpirun", ..., or "none".

    Raises:
        LaunchError: The numbers contradict each other.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int
    launcher: str = "none"

    def __post_init__(self) -> None:
        for index, count in (("rank", "world_size"), ("local_rank", "local_world_size"), ("node_rank", "num_nodes")):
            i, n = getattr(self, index), getattr(self, count)
            if n < 1:
                raise LaunchError(f"{self.launcher}: {count}={n}; it must be at least 1")
            if not 0 <= i < n:
                raise LaunchError(
                    f"{self.launcher}: {index}={i} does not fit {count}={n}; it must be from 0 to {n - 1}"
                )
        if self.local_world_size > self.world_size:
            raise LaunchError(
                f"{self.launcher}: local_world_size={self.local_world_size} is larger than world_size={self.world_size}"
            )
        # Every other node holds at least one rank, and one node holds them all exactly when it is the only one.
        others = self.world_size - self.local_world_size
        if self.num_nodes - 1 > others or (self.num_nodes == 1 and others):
            raise LaunchError(
                f"{self.launcher}: num_nodes={self.num_nodes} does not fit local_world_size={self.local_world_size} of "
                f"world_size={self.world_size}"
            )

    @classmethod
    def single(cls) -> Topology:
        """A world of one."""
        return cls(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, num_nodes=1)
