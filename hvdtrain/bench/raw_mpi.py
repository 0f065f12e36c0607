"""MPI's own collectives by mpi4py, with nothing of ours around them: what an engine over MPI is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mpi4py import MPI


class RawMpi:
    """Blocking calls on `MPI.COMM_WORLD`, in place where MPI can."""

    def __init__(self) -> None:
        self._world = MPI.COMM_WORLD
        self.rank: int = self._world.rank
        self.size: int = self._world.size

    def prepared(self, collective: str, size: int) -> Callable[[], object]:
        """A call that may be repeated; see `hvdtrain.bench.calls.Calls`."""
        world, whole = self._world, torch.zeros(size // 4).numpy()
        other = torch.zeros(size // 4).numpy()
        part = torch.zeros(size // 4 // self.size).numpy()
        calls: dict[str, Callable[[], object]] = {
            "all-reduce": lambda: world.Allreduce(MPI.IN_PLACE, whole),
            "all-gather": lambda: world.Allgather(part, whole),
            "reduce-scatter": lambda: world.Reduce_scatter_block(whole, part),
            "broadcast": lambda: world.Bcast(whole, root=0),
            "all-to-all": lambda: world.Alltoall(whole, other),
        }
        return calls[collective]

    def most(self, seconds: float) -> float:
        """The largest of all ranks' numbers."""
        return float(self._world.allreduce(seconds, MPI.MAX))
