"""Groups of ranks inside which a replica exchanges everything, and which send less to each other: a node each, or so many ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.wire import SelfWire
from hvdtrain.errors import ConfigError
from hvdtrain.settings.sync import group_of

if TYPE_CHECKING:
    from hvdtrain.backends.base import Backend


@dataclass(frozen=True, slots=True)
class Groups:
    """One rank's place among groups.

    Attributes:
        within: The ranks of this rank's group; the first of them speaks for it.
        between: Those that speak, one a group; None on the others.
        leaders: Of every rank of the world, which one speaks for its group.
    """

    within: Communicator
    between: Communicator | None
    leaders: tuple[int, ...]

    @property
    def speaks(self) -> tuple[bool, ...]:
        """Of every rank of the world, whether it speaks."""
        return tuple(leader == rank for rank, leader in enumerate(self.leaders))


def groups_of(backend: Backend, asked: str | int | None, *, beside: bool = False) -> Groups | None:
    """Form the groups; every rank must call it.

    Args:
        backend: Running.
        asked: "node", a number of ranks that follow each other, or None for no groups.
        beside: What is sent between groups is under way for long, and must not keep other messages waiting.

    Raises:
        ConfigError: The ranks cannot be divided like that.
    """
    kind = group_of(asked)
    if kind is None:
        return None
    members = _by_node(backend) if kind == "node" else _by_number(backend, int(kind))
    within: Communicator | None = None
    for ranks in members:
        if len(ranks) == 1:
            group: Communicator | None = _alone(backend) if ranks[0] == backend.rank else None
        else:
            group = backend if len(members) == 1 else backend.lasting_group(ranks)
        within = within or group
    first = [ranks[0] for ranks in members]
    between: Communicator | None
    if len(first) == 1:
        between = _alone(backend) if backend.rank == first[0] else None
    elif len(first) == backend.world_size and not beside:
        between = backend
    else:
        between = backend.lasting_group(first)
    assert within is not None
    leaders = {rank: ranks[0] for ranks in members for rank in ranks}
    return Groups(within, between, tuple(leaders[rank] for rank in range(backend.world_size)))


def _alone(backend: Backend) -> Communicator:
    return Communicator(SelfWire(backend.wire.device, backend.rank))


def _by_node(backend: Backend) -> list[list[int]]:
    nodes = backend.agree_beside("the agreement on which rank is on which node", str(backend.topology.node_rank))
    return [[rank for rank, on in enumerate(nodes) if on == node] for node in dict.fromkeys(nodes)]


def _by_number(backend: Backend, number: int) -> list[list[int]]:
    if backend.world_size == 1:
        return [[0]]
    if backend.world_size % number:
        raise ConfigError(
            f"sync_group={number} (--sync-group) does not divide {backend.world_size} ranks into equal groups; give a number that does, or node"
        )
    return [list(range(begin, begin + number)) for begin in range(0, backend.world_size, number)]
