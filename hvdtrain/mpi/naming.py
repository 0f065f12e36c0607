"""What torch.distributed asks a process group of Python about itself: its names, its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

_Base: Any = dist.ProcessGroup  # its stubs list overloads that differ between versions of torch


class NamedGroup(_Base):  # type: ignore[misc]
    """A process group without operations.

    Args:
        rank: This process's, in the group.
        ranks: The ranks in the world.
    """

    def __init__(self, rank: int, ranks: Sequence[int]) -> None:
        super().__init__(rank, len(ranks))
        self._comm_rank = int(rank)
        self._ranks = list(ranks)
        self._group_name = self._group_description = ""

    def getBackendName(self) -> str:
        """The name under which it is registered."""
        return "mpi4py"

    def name(self) -> str:
        """The name under which it is registered."""
        return "mpi4py"

    def getRank(self) -> int:
        """This process's rank in the group."""
        return self._comm_rank

    def getSize(self) -> int:
        """The number of ranks."""
        return len(self._ranks)

    def rank(self) -> int:
        """This process's rank in the group."""
        return self.getRank()

    def size(self) -> int:
        """The number of ranks."""
        return len(self._ranks)

    def getGroupName(self) -> str:
        """What torch.distributed calls this group."""
        return self._group_name

    def setGroupName(self, name: str) -> None:
        """Torch.distributed's name for this group."""
        self._group_name = name

    _set_group_name = setGroupName  # older versions of torch do not ask the Python class through the above

    @property
    def group_name(self) -> str:
        """The same."""
        return self._group_name

    def getGroupDesc(self) -> str:
        """What the user calls it."""
        return self._group_description

    def setGroupDesc(self, description: str) -> None:
        """The user's name for it."""
        self._group_description = description

    _set_group_desc = setGroupDesc

    @property
    def group_desc(self) -> str:
        """The same."""
        return self._group_description
