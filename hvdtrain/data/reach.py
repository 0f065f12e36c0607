"""What a rank may come to read of a data set, and in which order, as far as the ranks must agree on it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from hvdtrain.data.shards import Shard, own_shard, shard_of
from hvdtrain.data.source import Source
from hvdtrain.errors import ConfigError
from hvdtrain.launch.launchers import node_of
from hvdtrain.topology import Topology


class Ranks(Protocol):
    """What is asked of a backend here."""

    topology: Topology
    device: torch.device
    timeout_s: float

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return every rank's object, in the order of the ranks."""
        ...


def shard_for(source: Source, ranks: Ranks) -> Shard | None:
    """Return what this rank keeps of a data set; None where it may come to read any sample.

    With "sample-node" and "sample-own" every rank must call it: the ranks tell each other their nodes, or their lengths.
    """
    topology = ranks.topology
    if source.partition == "batch":
        return None
    if source.partition == "sample-own":
        return own_shard(topology.rank, ranks.all_gather_object(source.length))
    nodes: Sequence[object] = range(topology.world_size)
    if source.partition == "sample-node":
        nodes = ranks.all_gather_object(node_of(topology))
    return shard_of(source.partition, source.length, topology.rank, nodes)


def whole_length(source: Source, shard: Shard | None) -> int:
    """Return how many samples an epoch has over all ranks."""
    return source.length if shard is None or shard.sizes is None else sum(shard.sizes)


def first_index(source: Source, shard: Shard | None, seed: int) -> Any:
    """Return the data set index of a sample that this rank may read; None if there is none."""
    if shard is not None:
        return shard.kept[0] if shard.kept else None
    return 0 if source.sampler is None else source.order(0, seed=seed)[0]


def order_of(
    source: Source, shard: Shard | None, ranks: Ranks, *, epoch: int, seed: int, shuffle: bool
) -> Sequence[Any] | None:
    """Return the order of an epoch, where it is not the one of all samples that a seed gives; every rank must call it.

    Raises:
        ConfigError: As `agreed_order`.
    """
    if shard is not None:
        return shard.order(shuffle=shuffle, seed=seed, epoch=epoch)
    return None if source.sampler is None else agreed_order(source, ranks, epoch, seed)


def agreed_order(source: Source, ranks: Ranks, epoch: int, seed: int) -> Sequence[Any]:
    """Return the order that the source's sampler gives for an epoch, which must be the same on every rank.

    Raises:
        ConfigError: It is not; names the ranks.
    """
    order = source.order(epoch, seed=seed)
    if ranks.topology.world_size > 1:
        digest = hashlib.blake2b(repr(order).encode(), digest_size=16).hexdigest()
        found = ranks.all_gather_object((len(order), digest))
        differing = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
        if differing:
            raise ConfigError(
                f"the sampler, a {type(source.sampler).__name__}, gives rank{'s' if len(differing) > 1 else ''} "
                f"{', '.join(map(str, differing))} another order than rank 0 in epoch {epoch + 1}. It must give every rank the "
                "same order of the whole data set, which hvdtrain cuts: do not let it depend on the rank, and seed its "
                "generator alike everywhere"
            )
    return order
