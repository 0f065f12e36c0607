"""Sets of ranks whose operations do not wait for the others, as Horovod's process sets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hvdtrain.errors import ConfigError


class ProcessSet:
    """Some of the ranks. Give it to `hvd.init` or `hvd.add_process_set`, and then to operations.

    Args:
        ranks: Ranks of the world, in any order.

    Attributes:
        process_set_id: Its number while it can be used; None before and after.
        ranks: In ascending order.
    """

    process_set_id: int | None = None
    ranks: list[int] | None = None
    mpi_comm = None

    def __init__(self, ranks: Iterable[int]) -> None:
        if not isinstance(ranks, Iterable):
            raise ConfigError(
                f"a ProcessSet is made from a list of ranks here, got {type(ranks).__name__}; for an MPI communicator give "
                "comm.Get_group()'s ranks in COMM_WORLD"
            )
        members = sorted(ranks)
        if any(not isinstance(rank, int) for rank in members):
            raise ValueError(f"a ProcessSet is made from a list of ranks, got {members}")
        self.ranks = members
        self.own_rank: int | None = None  # of this process in the world, while the set can be used
        self.real: Any = None  # Horovod's own set, where that is the engine

    def size(self) -> int | None:
        """How many ranks it has; None while it cannot be used."""
        return None if self._out_of_use or self.ranks is None else len(self.ranks)

    def rank(self) -> int | None:
        """This process's rank in it; None while it cannot be used.

        Raises:
            ValueError: This process is not in it.
        """
        if self._out_of_use or self.ranks is None:
            return None
        if self.own_rank not in self.ranks:
            raise ValueError(f"rank {self.own_rank} is not in {self}")
        return self.ranks.index(self.own_rank)

    def included(self) -> bool | None:
        """Whether this process is in it; None while it cannot be used."""
        return None if self.ranks is None or self.own_rank is None else self.own_rank in self.ranks

    @property
    def _out_of_use(self) -> bool:
        return self.process_set_id is None or self.own_rank is None

    def __str__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


global_process_set = ProcessSet([])
"""All ranks; its number is 0."""
global_process_set.process_set_id = 0
