"""On each node one rank goes first: the wait of the others, through the store by which the ranks met.

No engine takes part, so a wait ends at once when the first rank's block fails, and no rank of another node is waited for.
"""

from __future__ import annotations

import itertools
import json
import socket
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from hvdtrain.backends.watch import NullWatch
from hvdtrain.errors import CollectiveError

if TYPE_CHECKING:
    from hvdtrain.topology import Topology

_STATED = ("torchrun", "srun")  # launchers that number the nodes; elsewhere the number may be derived from the rank
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

    def __init__(self, store: dist.Store, topology: Topology, watch: NullWatch) -> None:
        node = topology.node_rank if topology.launcher in _STATED else socket.gethostname()
        self._node = f"node {node}"
        self._store = dist.PrefixStore(f"local-first/{node}", store)
        self._topology = topology
        self._watch = watch
        self._blocks = itertools.count()
        if topology.local_rank == 0:
            self._store.set("first", str(topology.rank))

    def begin(self) -> int:
        """Count a block; every rank of the node counts alike. Returns its number."""
        number = next(self._blocks)
        if self._topology.local_rank == 0:
            with self._region(()):  # counted, so that the others see that it has begun
                pass
        return number

    def end(self, number: int, error: BaseException | None = None) -> None:
        """On local rank 0: let the others go on, or tell them why they must not."""
        said = _DONE if error is None else f"{type(error).__name__}: {error}"
        self._store.set(f"block/{number}", json.dumps(said))

    def wait(self, number: int, timeout_s: float) -> None:
        """On the other ranks: return when local rank 0 has ended its block.

        Raises:
            RankFailure: Its block failed, and that ended the job.
            CollectiveError: Its block failed, and it goes on; or it did not end within ``timeout_s`` seconds.
        """
        first = int(self._store.get("first"))
        end, pause = time.monotonic() + timeout_s, _FIRST_PAUSE_S
        with self._region((first,)):
            while not self._store.check([f"block/{number}"]):
                self._watch.raise_if_failed()
                if time.monotonic() > end:
                    absent = self._watch.missing(self._label, (first,))
                    raise CollectiveError(
                        f"local_rank_first: rank {self._topology.rank} waited {timeout_s:g} s for rank {first}, the first on "
                        f"{self._node}, to end its block{absent}; local_rank_first(timeout_s=...) waits longer"
                    )
                time.sleep(pause)
                pause = min(_LAST_PAUSE_S, pause * 1.5)
        said = json.loads(self._store.get(f"block/{number}"))
        if said == _DONE:
            return
        self._watch.wait_for_failure(_HEAR_S)
        self._watch.raise_if_failed()
        raise CollectiveError(f"local_rank_first: the block of rank {first}, the first on {self._node}, failed: {said}")

    @property
    def _label(self) -> str:
        return f"local_rank_first on {self._node}"

    def _region(self, ranks: tuple[int, ...]):  # type: ignore[no-untyped-def]
        return self._watch.region(self._label, "local_rank_first", ranks)
