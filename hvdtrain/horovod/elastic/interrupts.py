"""What interrupts an elastic job: a failed operation, or other hosts."""

from __future__ import annotations

from enum import IntFlag


class HostUpdate(IntFlag):
    """What happened to the hosts, as `State.on_hosts_updated` is told."""

    NONE = 0
    REMOVED = 1
    ADDED = 2


class HostsUpdatedInterrupt(RuntimeError):
    """The hosts of the job have changed; raised on all ranks at one commit.

    Args:
        skip_sync: The ranks that are left agree already, and need no copy of rank 0's state.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__("the hosts of the job have changed")
        self.skip_sync = skip_sync
