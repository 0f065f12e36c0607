"""On each node one rank goes first: the wait of the others, through the store by which the ranks met.

No engine takes part, so a wait ends at once when the first rank's block fails, and no rank of another node is waited for.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hvdtrain.errors import CollectiveError
from hvdtrain.launch.launchers import node_of
from hvdtrain.ranks.describing import described
from hvdtrain.ranks.store import Store, StoreLost
from hvdtrain.ranks.watch import NullWatch

if TYPE_CHECKING:
    from hvdtrain.topology import Topology

_FIRST_PAUSE_S = 0.002
_LAST_PAUSE_S = 0.1
_HEAR_S = 2.5  # how long a rank waits to hear whether the first rank's exception ends the job
_DONE = "done"


class LocalFirst:
    """The turns of one node's ranks.

    Args:
        store: By which the ranks met.
        topology: This rank's place. Local rank 0 tells the others its rank; they ask after all ranks have started.
        watch: Told what this rank waits for.
    """

    def __init__(self, store: Store, topology: Topology, watch: NullWatch) -> None:
        node = node_of(topology)
        self._node = f"node {node}"
        self._label = f"local_rank_first on {self._node}"
        self._store = store.under(f"local-first/{node}")
        self._topology = topology
        self._watch = watch
        self._blocks = itertools.count()
        if topology.local_rank == 0:
            self._store.set("first", str(topology.rank))

    @contextmanager
    def block(self, timeout_s: float) -> Iterator[None]:
        """Run a block on local rank 0, and then on the node's other ranks, which wait ``timeout_s`` seconds at most.

        Raises:
            RankFailure: On the others: the first rank's block failed, and that ended the job.
            CollectiveError: On the others: it failed, and that rank goes on; or it did not end in time.
        """
        number = next(self._blocks)  # every rank of the node counts alike
        if self._topology.local_rank != 0:
            self._wait(number, timeout_s)
            yield
            return
        with self._watch.region(
            self._label, "local_rank_first", (self._topology.rank,)
        ):  # counted: the others see that it has begun
            pass
        try:
            yield
        except BaseException as error:
            self._end(number, described(error))
            raise
        self._end(number, _DONE)

    def _end(self, number: int, said: str) -> None:
        try:
            self._store.set(f"block/{number}", json.dumps(said))
        except StoreLost as error:
            if said == _DONE:
                raise self._lost(error) from error

    def _wait(self, number: int, timeout_s: float) -> None:
        try:
            said = self._await_end(number, timeout_s)
        except StoreLost as error:
            raise self._lost(error) from error
        if said == _DONE:
            return
        self._watch.words.wait_for_first(_HEAR_S)
        self._watch.raise_if_failed()
        raise CollectiveError(f"local_rank_first: the block of local rank 0 on {self._node} failed: {said}")

    def _await_end(self, number: int, timeout_s: float) -> str:
        first = int(self._store.get("first"))
        end, pause = time.monotonic() + timeout_s, _FIRST_PAUSE_S
        with self._watch.region(self._label, "local_rank_first", (first,)):
            while not self._store.check([f"block/{number}"]):
                self._watch.raise_if_failed()
                if self._watch.failure is not None:  # this rank's own words: the first has left the program
                    raise CollectiveError(self._watch.failure.message)
                if time.monotonic() > end:
                    absent = self._watch.missing(self._label, (first,))
                    raise CollectiveError(
                        f"local_rank_first: rank {self._topology.rank} waited {timeout_s:g} s for rank {first}, the first on "
                        f"{self._node}, to end its block{absent}; local_rank_first(timeout_s=...) waits longer"
                    )
                time.sleep(pause)
                pause = min(_LAST_PAUSE_S, pause * 1.5)
        said: str = json.loads(self._store.get(f"block/{number}"))
        return said

    def _lost(self, error: Exception) -> CollectiveError:
        return CollectiveError(
            f"local_rank_first: rank {self._topology.rank} lost the connection to rank 0's store ({error}); rank 0 has most "
            "likely died"
        )
