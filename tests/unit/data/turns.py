"""Ranks as threads of one process that take turns, for what is exchanged while data is looked at."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from hvdtrain.topology import Topology


class Turns:
    """One rank; what a backend is to `hvdtrain.data`. A rank runs until it gathers, then the next one does.

    (Random generators belong to the process: two ranks must not run at once.)
    """

    timeout_s = 60.0
    device = torch.device("cpu")

    def __init__(self, rank: int, shared: Shared) -> None:
        self.topology = Topology(
            rank=rank,
            world_size=shared.world_size,
            local_rank=rank,
            local_world_size=shared.world_size,
            node_rank=0,
            num_nodes=1,
            launcher="threads",
        )
        self.gathered = 0
        self._shared = shared

    def all_gather_object(self, obj: Any) -> list[Any]:
        shared = self._shared
        self.gathered += 1
        shared.objects.setdefault(self.gathered, {})[self.topology.rank] = obj
        shared.turn.release()
        shared.barrier.wait(timeout=20)
        shared.turn.acquire()
        everyone = shared.objects[self.gathered]
        return [everyone[rank] for rank in range(shared.world_size)]


class Shared:
    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.turn = threading.Lock()
        self.barrier = threading.Barrier(world_size)
        self.objects: dict[int, dict[int, Any]] = {}


def on_ranks(world_size: int, body: Callable[[Turns], Any]) -> list[Any]:
    """Return what ``body`` returns, or the exception that it raises, on each rank."""
    shared = Shared(world_size)
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        with shared.turn:
            try:
                results[rank] = body(Turns(rank, shared))
            except Exception as error:
                results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
