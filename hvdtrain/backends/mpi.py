"""The `mpi` backend: the mpi4py process group on stock PyTorch.

On CPUs gradients leave from hooks, each large one as it lies: DistributedDataParallel copies all of them into its buckets,
which costs as much there as half of the exchange. GPU gradients go through DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvdtrain.backends.ddp import C10dWire, TorchBackend
from hvdtrain.backends.hooked import HookedReplica
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.replica_options import ReplicaOptions
from hvdtrain.backends.wire import Together, Wire, WireOp, Work
from hvdtrain.launch.detect import Detection
from hvdtrain.launch.launchers import may_join_by_mpi
from hvdtrain.mpi import Options, give_up, library, shut_down
from hvdtrain.ranks.exit import code_of, end_hard
from hvdtrain.ranks.rendezvous import Announce, Meeting

if TYPE_CHECKING:
    from torch.optim import Optimizer


class MpiBackend(TorchBackend):
    """PyTorch's engine on MPI's wire.

    Args:
        detection: Of mpirun, srun or horovodrun --mpi; or one process alone.
        options: As for `Backend`.
    """

    name = "mpi"

    def __init__(self, detection: Detection, **options: Any) -> None:
        super().__init__(detection, process_group="mpi4py", **options)

    @classmethod
    def unusable(cls) -> str:
        """Refuse an environment without mpi4py."""
        return TorchBackend.unusable() or library.why_not()

    @classmethod
    def refuses(cls, detection: Detection) -> str:
        """Refuse ranks that MPI did not start."""
        launcher, world = detection.topology.launcher, detection.topology.world_size
        if world == 1 or may_join_by_mpi(launcher):
            return ""
        return (
            f"backend 'mpi' cannot run under {launcher}, whose ranks MPI does not join; start it with "
            f"`mpirun -np {world} python -m hvdtrain`, or use --backend torch"
        )

    @property
    def engine(self) -> str:
        """The MPI library, once it is loaded."""
        return library.version() or "mpi4py"

    def _choose_process_group(self, wanted: str) -> str:
        return wanted

    def _variables(self, family: str) -> dict[str, str]:
        return {}  # by library.load

    def _announce(self) -> Announce | None:
        return library.announce(self.detection, self.timeout_s, self.all_reduce_family)

    def _init_process_group(self, meeting: Meeting) -> None:
        library.load(self.detection, self.all_reduce_family)
        library.check_world(self.detection, self.rank, self.world_size)
        dist.init_process_group(
            "mpi4py",
            store=self._store(meeting),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.timeout_s),
            pg_options=Options(
                watch=False, end=self._watch.end, all_reduce=self.all_reduce_family
            ),  # it has its own watch
        )
        self._watch.on_failure.append(give_up)
        dist.barrier()

    def _replicate(self, model: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions) -> Replica:
        if self.device.type == "cpu" and options.shard_modules is None:
            return HookedReplica(self, model, optimizer, options)
        return super()._replicate(model, optimizer, options)

    def _disconnect(self) -> None:
        super()._disconnect()
        shut_down()

    def _make_wire(self, group: Any, ranks: Sequence[int]) -> Wire:
        return MpiWire(group, ranks, self._wire_device)

    @property
    def _wire_device(self) -> torch.device:
        return self.device  # the group brings GPU tensors to MPI

    def _kill(self, error: BaseException) -> None:
        # MPI_Finalize would wait for ranks that are gone, and MPI_Abort reaches those that wait inside MPI.
        end_hard(code_of(error))


class MpiWire(C10dWire):
    """The wire of a C10dWire, on which a message waits for its receiver: MPI itself would buffer small ones."""

    _now: MpiWireAtOnce | None = None

    def all_gather_into(self, out: Tensor, tensor: Tensor) -> Work:
        """Start an all-gather, the same as `at_once` has: ranks that wait and ranks that do not may meet in it."""
        self.traffic.all_gather(tensor.nbytes, self.size)
        work: Work = self._group._allgather_base(out, tensor)
        return work

    def send_receive(self, sent: Tensor | None, dst: int | None, out: Tensor | None, src: int | None) -> Work:
        """Start a synchronous send and a receive."""
        self.traffic.message(0 if sent is None else sent.nbytes)
        works: list[Work] = []
        if out is not None and src is not None:
            works.append(self._group.recv([out], src))
        if sent is not None and dst is not None:
            works.append(self._group.send([sent], dst, synchronous=True))
        return Together(works)

    def reduce_scatter_into(self, out: Tensor, tensor: Tensor, op: WireOp) -> Work:
        """Start dist.reduce_scatter_tensor."""
        self.traffic.reduce_scatter(tensor.nbytes, self.size)
        work = dist.reduce_scatter_tensor(
            out.view(-1), tensor.view(-1), self._OPS[op], group=self._group, async_op=True
        )
        return self._started(work, out, tensor)

    @property
    def at_once(self) -> MpiWireAtOnce:
        """Operations that an idle group performs in the caller's own thread."""
        if self._now is None:
            self._now = MpiWireAtOnce(self._group, self.ranks, self.device)
        self._now.traffic = self.traffic
        return self._now

    def close(self) -> None:
        """Destroy the process group; older versions of torch (seen with 2.4) leave Python groups as they are."""
        group, self._now = self._group, None
        super().close()
        group.shutdown()


class MpiWireAtOnce(MpiWire):
    """A `MpiWire` whose operations may be over when they return; by the group's own calls, without torch.distributed's."""

    def __init__(self, group: Any, ranks: Sequence[int], device: torch.device) -> None:
        super().__init__(group, ranks, device)
        self._reducing = {op: _now(dist.AllreduceOptions(), reduceOp=engines) for op, engines in self._OPS.items()}
        self._scattering = {
            op: _now(dist.ReduceScatterOptions(), reduceOp=engines) for op, engines in self._OPS.items()
        }
        self._broadcasting = [_now(dist.BroadcastOptions(), rootRank=rank) for rank in range(self.size)]
        self._others = _now(dist.BarrierOptions())

    def all_reduce_(self, tensor: Tensor, op: WireOp) -> Work:
        """All-reduce."""
        self.traffic.all_reduce(tensor.nbytes, self.size)
        work: Work = self._group.allreduce([tensor], self._reducing[op])
        return work

    def reduce_scatter_into(self, out: Tensor, tensor: Tensor, op: WireOp) -> Work:
        """Reduce-scatter."""
        self.traffic.reduce_scatter(tensor.nbytes, self.size)
        work: Work = self._group._reduce_scatter_base(out, tensor, self._scattering[op])
        return work

    def all_gather_into(self, out: Tensor, tensor: Tensor) -> Work:
        """All-gather."""
        self.traffic.all_gather(tensor.nbytes, self.size)
        work: Work = self._group._allgather_base(out, tensor, self._others)
        return work

    def broadcast_(self, tensor: Tensor, src: int) -> Work:
        """Broadcast."""
        self.traffic.rooted(tensor.nbytes, self.size)
        work: Work = self._group.broadcast([tensor], self._broadcasting[src])
        return work

    def barrier(self) -> Work:
        """Barrier."""
        work: Work = self._group.barrier(self._others)
        return work


def _now(options: Any, **settings: Any) -> Any:
    """Options of torch.distributed's that say that the caller waits; older versions have no such word."""
    for name, value in settings.items():
        setattr(options, name, value)
    if hasattr(options, "asyncOp"):
        options.asyncOp = False
    return options
