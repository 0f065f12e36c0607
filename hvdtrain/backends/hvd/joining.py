"""How Horovod's ranks connect: through their launcher, or else over Gloo with a server of our own; and that they did.

`hvd.init()` waits for the other ranks without a bound, and says nothing of ranks that never meet: it is called when all
are known to be here, and what it found is compared with what the launcher said.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from hvdtrain.backends.hvd.library import hvd
from hvdtrain.backends.hvd.stamp import installed, short_library
from hvdtrain.backends.hvd.waiting import Waiter
from hvdtrain.errors import LaunchError
from hvdtrain.launch import algorithms, listening
from hvdtrain.launch.cores import bound_to_one_core, yielding
from hvdtrain.launch.detect import Detection
from hvdtrain.launch.environment import not_given, settle, variables
from hvdtrain.launch.launchers import may_join_by_mpi
from hvdtrain.ranks.rendezvous import Announce, Place, announce_by_horovodrun

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hvdtrain.ranks.store import Store

_ANNOUNCEMENT_BYTES = 8192
_log = logging.getLogger(__name__)


class Joining:
    """One rank's way into Horovod.

    Args:
        detection: What the launcher says.
        timeout_s: How long to wait for other ranks, in seconds.
        asked: Variables that Horovod must see.
        preferred: Variables that it is to see where nobody has set them.
        gpu: Whether NCCL will carry the tensors.
        all_reduce: Family of algorithms for all-reduce.

    Raises:
        ConfigError: Horovod's carrier cannot be told to use that family.
    """

    def __init__(
        self,
        detection: Detection,
        timeout_s: float,
        *,
        asked: Mapping[str, str],
        preferred: Mapping[str, str],
        gpu: bool,
        all_reduce: str,
    ) -> None:
        self._detection, self._timeout_s = detection, timeout_s
        self._asked, self._preferred = asked, preferred
        self._gpu, self._all_reduce = gpu, all_reduce
        self._server: Any = None
        self._check_all_reduce()

    def announce(self, waiter: Waiter) -> Announce | None:
        """How rank 0 says where it is to other hosts: through horovodrun's server, or Horovod itself over MPI."""
        detection, rank = self._detection, self._detection.topology.rank
        if detection.horovodrun_server is not None:
            return announce_by_horovodrun(detection.horovodrun_server, rank, detection.job_id, self._timeout_s)
        if not hvd.mpi_built() or not may_join_by_mpi(detection.topology.launcher):
            return None

        def by_horovod(place: Place | None) -> Place:
            self._init(waiter, {})
            text = json.dumps(place).encode().ljust(_ANNOUNCEMENT_BYTES)  # Horovod's own objects would be unpickled
            buffer = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            heard = waiter.call(
                lambda: hvd.broadcast(buffer, 0, name="hvdtrain.rendezvous"), "telling where rank 0 is", LaunchError
            )
            said: Place = json.loads(heard.numpy().tobytes())
            return said

        return by_horovod

    def join(self, store: Store, waiter: Waiter) -> None:
        """Start Horovod, unless `announce` has.

        Args:
            store: Connected with all ranks, which are here.
            waiter: Bounds the start.

        Raises:
            LaunchError: It did not start, or knows other ranks than the launcher.
        """
        if not hvd.is_initialized():
            self._init(waiter, self._way_to_connect(store))

    def close(self) -> None:
        """Stop the server, once all ranks have left."""
        if self._server is not None:
            self._server.stop()

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _over_gloo(self) -> bool:
        return not hvd.mpi_built() or self._detection.horovodrun_server is not None

    def _check_all_reduce(self) -> None:
        if self._gpu:
            algorithms.refuse("Horovod with NCCL", self._all_reduce, ("auto", "ring", "tree", "hierarchical"))
        elif self._over_gloo or not may_join_by_mpi(self._detection.topology.launcher):
            algorithms.refuse("Horovod over Gloo", self._all_reduce, ("auto", "ring"))
        else:
            algorithms.refuse("Horovod over MPI", self._all_reduce, ("auto", "ring", "tree", "rabenseifner"))
            here = installed()
            stamp = here.stamp if here else None
            algorithms.check_mpi(self._all_reduce, short_library(stamp.mpi) if stamp else "an unknown MPI")

    def _init(self, waiter: Waiter, way: Mapping[str, str]) -> None:
        topology = self._detection.topology
        if self._gpu and self._all_reduce != "hierarchical":
            settle(algorithms.nccl(self._all_reduce))  # Horovod reads NCCL's choice when it first needs it
        if bound_to_one_core() and topology.rank == 0:
            _log.warning(
                "this rank is bound to one core, which Horovod's own thread must share; give mpirun --bind-to none, or two cores a rank"
            )
        preferred = not_given({**self._preferred, **yielding(topology)})
        family = "auto" if self._gpu or self._over_gloo else self._all_reduce
        with (
            algorithms.mpi(family, topology) as tuning,
            variables({**tuning, **listening.mpi(topology), **way, **preferred, **self._asked}),
        ):
            waiter.call(hvd.init, "hvd.init()", LaunchError)
        _compare(self._detection)

    def _way_to_connect(self, store: Store) -> dict[str, str]:
        """The variables by which Horovod finds the other ranks, where the launcher has not set them."""
        topology = self._detection.topology
        if may_join_by_mpi(topology.launcher) or self._detection.horovodrun_server is not None:
            return {}
        if not hvd.gloo_built():
            raise LaunchError(
                "without a launcher Horovod connects over Gloo, which this one was built without; use mpirun, or rebuild it: "
                "hvdtrain install-horovod --gloo --force"
            )
        if topology.rank == 0:
            store.set("gloo", f"127.0.0.1:{self._serve(topology.world_size)}")
        end = time.monotonic() + self._timeout_s
        while not store.check(["gloo"]):
            if time.monotonic() > end:
                raise LaunchError(
                    f"rank {topology.rank} waited {self._timeout_s:g} s for rank 0 to start Horovod's server"
                )
            time.sleep(0.01)
        host, port = store.get("gloo").decode().split(":")
        return {
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": host,
            "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
            "HOROVOD_GLOO_IFACE": "lo",
            "HOROVOD_HOSTNAME": "localhost",
            "HOROVOD_RANK": str(topology.rank),
            "HOROVOD_SIZE": str(topology.world_size),
            "HOROVOD_LOCAL_RANK": str(topology.local_rank),
            "HOROVOD_LOCAL_SIZE": str(topology.local_world_size),
            "HOROVOD_CROSS_RANK": "0",
            "HOROVOD_CROSS_SIZE": "1",
        }

    def _serve(self, world_size: int) -> int:
        from horovod.runner.common.util.hosts import HostInfo, get_host_assignments  # noqa: PLC0415
        from horovod.runner.http.http_server import RendezvousServer  # noqa: PLC0415 - imports much, seldom needed

        self._server = RendezvousServer(verbose=0)
        port = self._server.start()
        self._server.init(get_host_assignments([HostInfo("localhost", world_size)], world_size))
        return int(port)


def _compare(detection: Detection) -> None:
    """Refuse ranks whom Horovod numbers otherwise than their launcher."""
    mine, topology = (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()), detection.topology
    theirs = (topology.rank, topology.world_size, topology.local_rank, topology.local_world_size)
    if mine[:2] == theirs[:2]:
        if mine != theirs:
            _log.warning("local rank and size: Horovod has %s, the launcher said %s", mine[2:], theirs[2:])
        return
    hint = ""
    if hvd.size() == 1:
        hint = (
            ". Every rank is a world of its own: the mpirun (or srun --mpi=...) that started it belongs to another MPI library "
            "than the one Horovod was built with; use the mpirun of that library (hvdtrain install-horovod --check names it)"
        )
    raise LaunchError(
        f"{detection.reason}: rank {theirs[0]} of {theirs[1]}, but Horovod says rank {mine[0]} of {mine[1]}{hint}"
    )
