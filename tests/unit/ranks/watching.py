"""A world of ranks in one process that watch each other over a real store."""

from __future__ import annotations

import time

from hvdtrain.ranks.rendezvous import dial, serve
from hvdtrain.ranks.watch import Watch


class Ranks:
    """A world of watches that share a store; their processes' ends are noted instead."""

    def __init__(self, size: int) -> None:
        self.process, self.place = serve(one_node=True, job="test")
        self.ended: dict[int, int] = {}
        self.stores = [dial(self.place, "test", rank, 10.0) for rank in range(size)]
        self.watches = [self._watch(rank, size) for rank in range(size)]

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
        for store in self.stores:
            store.close()
        self.process.wait(10)


def until(true, limit_s: float = 10) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
