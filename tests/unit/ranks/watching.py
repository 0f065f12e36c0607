"""A world of ranks in one process that watch each other over a real store."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

from hvdtrain.ranks.watch import Watch


class Ranks:
    """A world of watches that share a store; their processes' ends are noted instead."""

    def __init__(self, size: int) -> None:
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ended: dict[int, int] = {}
        self.stores = [self._connect() for _ in range(size)]
        self.watches = [self._watch(rank, size) for rank in range(size)]

    def _connect(self) -> dist.TCPStore:
        return dist.TCPStore(
            "127.0.0.1", self.server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10)
        )

    def _watch(self, rank: int, size: int) -> Watch:
        watch = Watch(
            self.stores[rank], rank, size, interval_s=0.05, exit_process=lambda code: self.ended.__setitem__(rank, code)
        )
        watch.start()
        return watch

    def __iter__(self):
        return iter(self.watches)

    def close(self) -> None:
        for watch in self.watches:
            watch.close()


def until(true, limit_s: float = 10) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
