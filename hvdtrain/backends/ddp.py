"""The `torch` backend: DistributedDataParallel over NCCL (GPU) or Gloo (CPU)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvdtrain.backends.base import Backend
from hvdtrain.backends.group import Group
from hvdtrain.backends.lingering import keep, let_go
from hvdtrain.backends.reducer import ReducerReplica
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.replica_options import ReplicaOptions
from hvdtrain.backends.wire import Together, Wire, WireOp, Work
from hvdtrain.errors import BackendUnavailable, ConfigError, HvdtrainError, LaunchError
from hvdtrain.launch import algorithms, listening
from hvdtrain.launch.detect import Detection
from hvdtrain.launch.environment import settle
from hvdtrain.ranks.engine_store import EngineStore
from hvdtrain.ranks.rendezvous import Meeting
from hvdtrain.ranks.torch_store import torch_store

if TYPE_CHECKING:
    from torch.optim import Optimizer

_log = logging.getLogger(__name__)


class TorchBackend(Backend):
    """PyTorch's own engine.

    Args:
        detection: Any launcher's.
        process_group: "nccl", "gloo", or "auto" for the one that fits the device.
        options: As for `Backend`.
    """

    name = "torch"
    shards_models = True

    def __init__(self, detection: Detection, *, process_group: str = "auto", **options: Any) -> None:
        super().__init__(detection, **options)
        self.process_group = self._choose_process_group(process_group)
        self._engine_settings = self._variables(self.all_reduce_family)
        self._kept: tuple[dist.Store, object] | None = None

    @classmethod
    def unusable(cls) -> str:
        """Refuse a torch without torch.distributed."""
        return (
            "" if dist.is_available() else "this build of torch has no torch.distributed; install PyTorch's own wheel"
        )

    @property
    def engine(self) -> str:
        """The process group's name."""
        return self.process_group

    def _choose_process_group(self, wanted: str) -> str:
        fitting = "nccl" if self.device.type == "cuda" else "gloo"
        if wanted == "auto":
            return fitting
        if wanted not in ("nccl", "gloo"):
            raise ConfigError(f"--process-group {wanted}: use auto, nccl or gloo")
        if wanted == "nccl" and not dist.is_nccl_available():
            raise BackendUnavailable("--process-group nccl: this build of torch has no NCCL; use gloo")
        if wanted == "nccl" and self.device.type != "cuda":
            raise ConfigError(
                f"--process-group nccl moves GPU tensors only, and this rank's device is {self.device}; use gloo"
            )
        return wanted

    def _variables(self, family: str) -> dict[str, str]:
        """The variables that make the engine use a family of all-reduce algorithms; refuses what it has not."""
        if self.process_group == "nccl":
            return algorithms.nccl(family)
        algorithms.refuse("torch's Gloo", family, ("auto", "ring"))  # a ring is what it uses
        return {}

    def _connect(self) -> None:
        if dist.is_initialized():
            raise LaunchError(
                "torch.distributed is already initialised in this process; let hvdtrain.init() do it, or destroy the process group first"
            )
        topology = self.topology
        meeting = self._meet()
        try:
            self._init_process_group(meeting)
        except HvdtrainError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            raise LaunchError(
                f"rank {topology.rank} of {topology.world_size} could not form the {self.engine} process group within "
                f"{self.timeout_s:g} s: {error}"
            ) from error
        self._wire = self._make_wire(dist.group.WORLD, range(topology.world_size))

    def _init_process_group(self, meeting: Meeting) -> None:
        topology = self.topology
        settle({**listening.gloo(topology), **self._engine_settings})
        more: dict[str, Any] = {"device_id": self.device} if self.process_group == "nccl" else {}
        dist.init_process_group(
            self.process_group,
            store=self._store(meeting),
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=timedelta(seconds=self.timeout_s),
            **more,
        )
        dist.barrier()  # every rank is connected to every other, so the first collective cannot be the first to fail

    def _store(self, meeting: Meeting) -> dist.Store:
        """Where the process groups find each other; kept as long as they are."""
        if self.process_group == "nccl":  # it asks from threads of its own, which Python must not hold up at the end
            self._kept = torch_store(self.detection, meeting.store, self.timeout_s)
        else:
            engine_store = EngineStore(meeting.store.under("engine"), self.timeout_s, self._watch.raise_if_failed)
            self._kept = (engine_store, None)
        return self._kept[0]

    @property
    def _wire_device(self) -> torch.device:
        return self.device if self.process_group == "nccl" else torch.device("cpu")

    def _disconnect(self) -> None:
        let_go()
        dist.destroy_process_group()
        self._kept = None

    def _replicate(self, model: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions) -> Replica:
        if options.shard_modules is not None:
            from hvdtrain.backends.fully_sharded import FullyShardedReplica  # noqa: PLC0415 - loads much of torch

            return FullyShardedReplica(self, model, optimizer, options)
        return ReducerReplica(self, model, optimizer, options)

    def _group(self, ranks: list[int]) -> Group | None:
        group = dist.new_group(ranks, timeout=timedelta(seconds=self.timeout_s), use_local_synchronization=False)
        if self.rank not in ranks:
            return None
        return Group(self._make_wire(group, ranks), self._watch, check=self._check, label=f"group {ranks}")

    def _make_wire(self, group: Any, ranks: Sequence[int]) -> Wire:
        return C10dWire(group, ranks, self._wire_device)


class C10dWire(Wire):
    """A wire over any torch.distributed process group."""

    _OPS = {  # noqa: RUF012 - constant
        "sum": dist.ReduceOp.SUM,
        "min": dist.ReduceOp.MIN,
        "max": dist.ReduceOp.MAX,
        "product": dist.ReduceOp.PRODUCT,
    }

    def __init__(self, group: Any, ranks: Sequence[int], device: torch.device) -> None:
        super().__init__(list(ranks).index(dist.get_rank()), ranks, device)
        self._group = group

    def all_reduce_(self, tensor: Tensor, op: WireOp) -> Work:
        """Start dist.all_reduce."""
        self.traffic.all_reduce(tensor.nbytes, self.size)
        return self._started(dist.all_reduce(tensor, self._OPS[op], group=self._group, async_op=True), tensor)

    def all_gather_into(self, out: Tensor, tensor: Tensor) -> Work:
        """Start dist.all_gather."""
        self.traffic.all_gather(tensor.nbytes, self.size)
        parts = list(out.unbind())
        return self._started(dist.all_gather(parts, tensor, group=self._group, async_op=True), tensor, *parts)

    def all_to_all_into(self, out: Tensor, tensor: Tensor, receive: Sequence[int], send: Sequence[int]) -> Work:
        """Start dist.all_to_all_single."""
        self.traffic.all_to_all([count * tensor.itemsize for count in send], self.rank)
        work = dist.all_to_all_single(out, tensor, list(receive), list(send), group=self._group, async_op=True)
        return self._started(work, out, tensor)

    def broadcast_(self, tensor: Tensor, src: int) -> Work:
        """Start dist.broadcast."""
        self.traffic.rooted(tensor.nbytes, self.size)
        return self._started(dist.broadcast(tensor, self.ranks[src], group=self._group, async_op=True), tensor)

    def reduce_(self, tensor: Tensor, op: WireOp, dst: int) -> Work:
        """Start dist.reduce."""
        self.traffic.rooted(tensor.nbytes, self.size)
        work = dist.reduce(tensor, self.ranks[dst], self._OPS[op], group=self._group, async_op=True)
        return self._started(work, tensor)

    def send_receive(self, sent: Tensor | None, dst: int | None, out: Tensor | None, src: int | None) -> Work:
        """Start dist.isend and dist.irecv, both at once: NCCL would do them one after the other."""
        self.traffic.message(0 if sent is None else sent.nbytes)
        both = ((dist.isend, sent, dst), (dist.irecv, out, src))
        messages = [
            dist.P2POp(start, tensor, self.ranks[peer], self._group)
            for start, tensor, peer in both
            if tensor is not None and peer is not None
        ]
        keep(*(tensor for tensor in (sent, out) if tensor is not None))
        return Together([self._started(work) for work in dist.batch_isend_irecv(messages)])

    def barrier(self) -> Work:
        """Start dist.barrier."""
        return self._started(dist.barrier(group=self._group, async_op=True))

    def close(self) -> None:
        """Destroy the process group."""
        group, self._group = self._group, None
        let_go()
        try:
            dist.destroy_process_group(group)
        except ValueError:  # the backend has stopped, and all its groups with it
            return

    @staticmethod
    def _started(work: Work | None, *tensors: Tensor) -> Work:
        keep(*tensors)
        if work is None:
            raise HvdtrainError("torch.distributed returned no work: this rank is not in the group")
        return work
