"""The `horovod` backend: real Horovod, driven through its collectives.

Of Horovod this uses the engine (negotiation by name, fusion, MPI, Gloo and NCCL inside) and not
`horovod.torch.DistributedOptimizer`, whose wrapper replaces the user's optimizer, fills unused gradients with zeros,
knows no micro-batches of varying number, and exchanges before a closure runs. The gradients leave from hooks of our own
(`HookedReplica`), so that everything promised in `Replica` holds here as on every engine.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hvdtrain.backends import algorithms
from hvdtrain.backends.base import Backend
from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.hooked import HookedReplica, Pack
from hvdtrain.backends.horovod_stamp import installed, short_library, why_not
from hvdtrain.backends.pairs import Pairs
from hvdtrain.backends.rendezvous import Tell, tell_by_horovodrun
from hvdtrain.backends.replica import Replica, ReplicaOptions
from hvdtrain.backends.weighting import Tally
from hvdtrain.backends.wire import Then, Wire, WireOp, Work
from hvdtrain.errors import BackendUnavailable, CollectiveError, ConfigError, HvdtrainError, LaunchError, RankFailure
from hvdtrain.launch.detect import Detection
from hvdtrain.launch.environment import variables

_missing = why_not()
if _missing:
    raise BackendUnavailable(_missing)

import horovod  # noqa: E402 - only once it is known to fit
import horovod.torch as hvd  # noqa: E402

if TYPE_CHECKING:
    from torch.optim import Optimizer

_log = logging.getLogger(__name__)
T = TypeVar("T")

_SHUTDOWN_S = 3.0  # a failed rank gives Horovod's own shutdown so long before it ends without
_NAMES = 512  # names in use for collectives; more in flight wait for the oldest


class HorovodBackend(Backend):
    """Horovod under horovodrun, mpirun, srun or `hvdtrain.spawn`.

    Args:
        detection: Of any launcher but torchrun.
        compression: "none", "fp16" (Horovod sums halves) or "bf16" (exchanged as bfloat16, summed in float32).
        op: "average", or "adasum" (Maleki et al. 2020) on the gradients; needs MPI and a power of two of ranks.
        gradient_predivide_factor: Gradients are divided by it before and multiplied by it after the sum.
        num_groups: None: gradients are packed by us. 0: each is given to Horovod by itself, to be fused by it.
            N: N grouped all-reduces.
        fusion_threshold_mb: Size of Horovod's fusion buffer, MiB; 0 fuses nothing.
        cycle_time_ms: How often Horovod looks for work, milliseconds.
        cache_capacity: How many tensors Horovod remembers, to negotiate them faster.
        autotune: Let Horovod search fusion threshold and cycle time while training.
        autotune_log: A file for what it tries.
        hierarchical_allreduce: Reduce within each node first (NCCL only).
        hierarchical_allgather: Gather within each node first (MPI only).
        timeline: A file for Horovod's trace of every tensor (chrome://tracing).
        timeline_mark_cycles: Mark the cycles in it.
        stall_check_s: Seconds after which Horovod warns of tensors that some ranks lack; 0 for never.
        stall_shutdown_s: Seconds after which it ends the job for it; 0 for never.
        process_sets: Allow `group`; costs a little in each cycle.
        options: As for `Backend`.
    """

    name = "horovod"
    restartable: ClassVar[bool] = False  # MPI cannot be initialised twice

    def __init__(
        self,
        detection: Detection,
        *,
        compression: str = "none",
        op: str = "average",
        gradient_predivide_factor: float = 1.0,
        num_groups: int | None = None,
        fusion_threshold_mb: float | None = None,
        cycle_time_ms: float | None = None,
        cache_capacity: int | None = None,
        autotune: bool = False,
        autotune_log: str | None = None,
        hierarchical_allreduce: bool = False,
        hierarchical_allgather: bool = False,
        timeline: str | None = None,
        timeline_mark_cycles: bool = False,
        stall_check_s: float | None = None,
        stall_shutdown_s: float | None = None,
        process_sets: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(detection, **options)
        self._check_all_reduce()
        if self.all_reduce_family == "hierarchical":
            hierarchical_allreduce = True
        self.compression = _one_of("compression", compression, ("none", "fp16", "bf16"))
        self.op = _one_of("op", op, ("average", "adasum"))
        self.gradient_predivide_factor = gradient_predivide_factor
        self.num_groups = num_groups
        world = detection.topology.world_size
        if op == "adasum":
            if world & (world - 1):
                raise ConfigError(f"--horovod.op adasum needs a power of two of ranks, got {world}; start 2, 4, 8, ...")
            if compression == "bf16" or gradient_predivide_factor != 1.0:
                raise ConfigError("--horovod.op adasum goes with neither bf16 compression nor a predivide factor")
            if not hvd.mpi_built():
                raise ConfigError(
                    "--horovod.op adasum needs a Horovod with MPI: hvdtrain install-horovod --mpi --force"
                )
        if gradient_predivide_factor <= 0:
            raise ConfigError(
                f"--horovod.gradient-predivide-factor must be positive, got {gradient_predivide_factor:g}"
            )
        if num_groups is not None and num_groups < 0:
            raise ConfigError(f"--horovod.num-groups must not be negative, got {num_groups}")
        if hierarchical_allreduce and not hvd.nccl_built():
            raise ConfigError(
                "--horovod.hierarchical-allreduce is an algorithm of Horovod's NCCL operations, and this Horovod has no NCCL: "
                "hvdtrain install-horovod --nccl on --force, or leave it out"
            )
        if hierarchical_allgather and not hvd.mpi_built():
            raise ConfigError("--horovod.hierarchical-allgather needs a Horovod with MPI")
        if (hierarchical_allreduce or hierarchical_allgather) and detection.topology.num_nodes == 1:
            _log.warning("Horovod does nothing hierarchical on one node; --horovod.hierarchical-* have no effect here")
        self._environment = {
            name: str(value)
            for name, value in {
                "HOROVOD_FUSION_THRESHOLD": None if fusion_threshold_mb is None else int(fusion_threshold_mb * 2**20),
                "HOROVOD_CYCLE_TIME": cycle_time_ms,
                "HOROVOD_CACHE_CAPACITY": cache_capacity,
                "HOROVOD_AUTOTUNE": 1 if autotune else None,
                "HOROVOD_AUTOTUNE_LOG": autotune_log,
                "HOROVOD_HIERARCHICAL_ALLREDUCE": 1 if hierarchical_allreduce else None,
                "HOROVOD_HIERARCHICAL_ALLGATHER": 1 if hierarchical_allgather else None,
                "HOROVOD_TIMELINE": timeline,
                "HOROVOD_TIMELINE_MARK_CYCLES": 1 if timeline_mark_cycles else None,
                "HOROVOD_STALL_CHECK_TIME_SECONDS": math.ceil(stall_check_s) if stall_check_s else None,
                "HOROVOD_STALL_CHECK_DISABLE": 1 if stall_check_s == 0 else None,
                "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": math.ceil(stall_shutdown_s) if stall_shutdown_s else None,
                "HOROVOD_DYNAMIC_PROCESS_SETS": 1 if process_sets else None,
            }.items()
            if value is not None
        }
        self._process_sets: dict[tuple[int, ...], Any] = {}
        self._groups_made = 0
        self._rendezvous_server: Any = None
        self.pairs: Pairs

    @classmethod
    def unusable(cls) -> str:
        """Say what is wrong with the installed Horovod."""
        return why_not()

    @classmethod
    def refuses(cls, detection: Detection) -> str:
        """Refuse torchrun, and mpirun or srun without MPI."""
        launcher, world = detection.topology.launcher, detection.topology.world_size
        if launcher == "torchrun":
            return (
                "backend 'horovod' cannot run under torchrun, which gives Horovod no way to connect its ranks; start it with "
                f"`horovodrun -np {world} python -m hvdtrain`, or use --backend torch"
            )
        if launcher in ("mpirun", "srun") and world > 1 and not hvd.mpi_built():
            return (
                f"this Horovod was built without MPI, so {launcher} cannot start it; use `horovodrun --gloo -np {world} ...`, or "
                "rebuild it: hvdtrain install-horovod --mpi --force"
            )
        return ""

    @property
    def engine(self) -> str:
        """Horovod's version and what carries its bytes."""
        if not hvd.is_initialized():
            return f"Horovod {horovod.__version__}"
        carrier = "NCCL" if self._gpu else "MPI" if hvd.mpi_enabled() else "Gloo"
        return f"Horovod {horovod.__version__}, {carrier}"

    # -- life ---------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if hvd.is_initialized():
            raise LaunchError(
                "Horovod is already initialised in this process; let hvdtrain.init() do it, and drop hvd.init()"
            )
        meeting = self._meet()
        try:
            self._wait_for_everyone(meeting.engine)
            self._all_met()
            if not hvd.is_initialized():
                self._init(self._way_to_connect(meeting.engine))
            self._compare_with_horovod()
        except BaseException:
            self._watch.close()
            raise
        self.pairs = Pairs(
            meeting.engine, self.rank, self.timeout_s, self._watch, one_node=self.topology.num_nodes == 1
        )
        self._wire = HorovodWire(self, range(self.world_size), hvd.global_process_set, "world")

    def _init(self, way: dict[str, str]) -> None:
        nccl = algorithms.nccl(self.all_reduce_family) if self._gpu and self.all_reduce_family != "hierarchical" else {}
        # Horovod reads NCCL's choice when it first needs it, so that one stays.
        os.environ.update(nccl)
        family = "auto" if self._gpu or self._over_gloo else self.all_reduce_family
        with (
            algorithms.mpi(family, self.topology) as told,
            variables({**told, **way, **self._defaults(), **self._environment}),
        ):
            self.bounded(hvd.init, "hvd.init()", LaunchError)

    @property
    def _over_gloo(self) -> bool:
        return not hvd.mpi_built() or "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ

    def _check_all_reduce(self) -> None:
        if self._gpu:
            algorithms.refuse("Horovod with NCCL", self.all_reduce_family, ("auto", "ring", "tree", "hierarchical"))
        elif self._over_gloo or self.topology.launcher not in ("mpirun", "srun", "horovodrun"):
            algorithms.refuse("Horovod over Gloo", self.all_reduce_family, ("auto", "ring"))
        else:
            algorithms.refuse("Horovod over MPI", self.all_reduce_family, ("auto", "ring", "tree", "rabenseifner"))
            found = installed()
            stamp = found.stamp if found else None
            algorithms.check_mpi(self.all_reduce_family, short_library(stamp.mpi) if stamp else "an unknown MPI")

    def _tell(self) -> Tell | None:
        topology = self.topology
        by_http = tell_by_horovodrun(topology.rank, self.detection.job_id, self.timeout_s)
        if by_http is not None or not hvd.mpi_built() or topology.launcher not in ("mpirun", "srun", "horovodrun"):
            return by_http

        def by_horovod(content: Any) -> Any:
            self._init({})
            self._compare_with_horovod()
            return self.bounded(
                lambda: hvd.broadcast_object(content, root_rank=0, name="hvdtrain.rendezvous"),
                "telling where rank 0 is",
                LaunchError,
            )

        return by_horovod

    def _disconnect(self) -> None:
        self.pairs.close()
        _shut_down(self.timeout_s)
        if self._rendezvous_server is not None:
            self._rendezvous_server.stop()

    def _kill(self, error: BaseException) -> None:
        # Horovod joins its thread when the process ends, and that thread may wait in MPI for ranks that are gone.
        _end.code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else _code_of(error)
        if _shut_down(_SHUTDOWN_S):
            _end.code = None

    def _defaults(self) -> dict[str, str]:
        """Settings that serve packs better than Horovod's own (docs/performance.md), where nobody has chosen any."""
        chosen = {}
        if self.num_groups is None and "HOROVOD_AUTOTUNE" not in self._environment:
            # Packs are fused already. Fusing them again copies, and makes the order of a sum a matter of timing.
            chosen["HOROVOD_FUSION_THRESHOLD"] = "0"
        bound = len(os.sched_getaffinity(0)) < 2 <= (os.cpu_count() or 1)
        if bound and self.rank == 0:
            _log.warning(
                "this rank is bound to one core, which Horovod's own thread must share; give mpirun --bind-to none, or two cores a rank"
            )
        if bound or 2 * self.topology.local_world_size > (os.cpu_count() or 1):
            # Horovod's thread waits inside MPI for most of the time: it must not take the core from the training.
            chosen["OMPI_MCA_mpi_yield_when_idle"] = "1"
        return {name: value for name, value in chosen.items() if name not in os.environ}

    def _wait_for_everyone(self, store: torch.distributed.Store) -> None:
        """Return when all ranks are here with the same Horovod: hvd.init() would wait for them without a bound."""
        mine = f"Horovod {horovod.__version__}, {'MPI' if hvd.mpi_built() else 'no MPI'}, {'NCCL' if hvd.nccl_built() else 'no NCCL'}"
        store.set(f"here/{self.rank}", mine)
        for rank in range(self.world_size):
            try:
                store.wait([f"here/{rank}"], timedelta(seconds=self.timeout_s))
            except RuntimeError as error:
                raise LaunchError(
                    f"rank {self.rank} waited {self.timeout_s:g} s for rank {rank} to start Horovod"
                ) from error
            theirs = store.get(f"here/{rank}").decode()
            if theirs != mine:
                raise LaunchError(
                    f"rank {self.rank} has {mine}, but rank {rank} {theirs}: install the same on every host"
                )

    def _way_to_connect(self, store: torch.distributed.Store) -> dict[str, str]:
        """The variables by which Horovod finds the other ranks, where the launcher has not set them."""
        topology = self.topology
        if topology.launcher in ("mpirun", "srun", "horovodrun") or os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR"):
            return {}
        if not hvd.gloo_built():
            raise LaunchError(
                "without a launcher Horovod connects over Gloo, which this one was built without; use mpirun, or rebuild it: "
                "hvdtrain install-horovod --gloo --force"
            )
        if self.rank == 0:
            store.set("gloo", f"127.0.0.1:{self._serve_rendezvous()}")
        store.wait(["gloo"], timedelta(seconds=self.timeout_s))
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

    def _serve_rendezvous(self) -> int:
        from horovod.runner.common.util.hosts import HostInfo, get_host_assignments  # noqa: PLC0415
        from horovod.runner.http.http_server import RendezvousServer  # noqa: PLC0415 - imports much, seldom needed

        server = RendezvousServer(verbose=0)
        port = server.start()
        server.init(get_host_assignments([HostInfo("localhost", self.world_size)], self.world_size))
        self._rendezvous_server = server
        return int(port)

    def _compare_with_horovod(self) -> None:
        mine, topology = (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()), self.topology
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
            f"{self.detection.reason}: rank {theirs[0]} of {theirs[1]}, but Horovod says rank {mine[0]} of {mine[1]}{hint}"
        )

    # -- waiting ------------------------------------------------------------------------------------------------------

    def poll_until(self, done: Callable[[], bool], what: str) -> None:
        """Wait for Horovod, but not for ever, and not for a rank that has failed.

        Raises:
            RankFailure: Another rank reported a failure.
            RuntimeError: It took longer than the timeout.
        """
        end = time.monotonic() + self.timeout_s
        pause = 0.0  # first yield, then sleep: Horovod's own wait spins, which takes the core from its thread
        for turn in range(1 << 62):
            if done():
                return
            if turn > 20:
                pause = min(0.002, 2e-5 + pause * 1.02)
                self._watch.raise_if_failed()
                if time.monotonic() > end:
                    raise RuntimeError(f"timed out: Horovod had not finished {what} after {self.timeout_s:g} s")
            time.sleep(pause)

    def bounded(self, call: Callable[[], T], what: str, failure: type[HvdtrainError] = CollectiveError) -> T:
        """Run a call of Horovod that blocks without a bound in a thread, and wait for it with one."""
        box: list[tuple[bool, Any]] = []

        def run() -> None:
            try:
                box.append((True, call()))
            except BaseException as error:
                box.append((False, error))

        threading.Thread(target=run, name=f"hvdtrain-{what}", daemon=True).start()
        try:
            self.poll_until(lambda: bool(box), what)
        except RankFailure:
            raise
        except RuntimeError as error:
            raise failure(f"rank {self.rank} of {self.world_size}: {error}") from error
        good, result = box[0]
        if not good:
            raise failure(f"rank {self.rank} of {self.world_size}: {what} failed: {result}") from result
        found: T = result
        return found

    # -- work ---------------------------------------------------------------------------------------------------------

    @property
    def _gpu(self) -> bool:
        return self.device.type == "cuda" and bool(hvd.nccl_built())

    @property
    def wire_device(self) -> torch.device:
        """Where Horovod takes tensors: the GPU if it was built with NCCL, else the CPU."""
        return self.device if self._gpu else torch.device("cpu")

    def _replicate(self, model: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions) -> Replica:
        return HorovodReplica(self, model, optimizer, options)

    def _group(self, ranks: list[int]) -> Communicator | None:
        self._groups_made += 1
        key = tuple(ranks)
        if len(ranks) == self.world_size:
            process_set = hvd.global_process_set
        elif key in self._process_sets:
            process_set = self._process_sets[key]
        else:
            if "HOROVOD_DYNAMIC_PROCESS_SETS" not in self._environment:
                raise ConfigError("groups of ranks need Horovod's process sets; leave --horovod.no-process-sets out")
            with self.region("groups", f"making the group {ranks}"):
                process_set = self.bounded(lambda: hvd.add_process_set(ranks), f"add_process_set({ranks})")
            self._process_sets[key] = process_set
        if self.rank not in ranks:
            return None
        label = f"group {ranks}"
        wire = HorovodWire(self, ranks, process_set, f"group{self._groups_made}", self._groups_made)
        return Communicator(wire, self._real_watch, check=self._check, label=label)


class HorovodWork:
    """One of Horovod's handles.

    Args:
        backend: Whose timeout bounds the wait.
        handle: From one of Horovod's ``_async`` functions.
        what: The tensor's name, for messages.
        finish: Takes Horovod's output.
    """

    def __init__(
        self, backend: HorovodBackend, handle: int, what: str, finish: Callable[[Any], None] | None = None
    ) -> None:
        self._backend, self._handle, self._what, self._finish = backend, handle, what, finish
        self._done = False

    def wait(self) -> object:
        """Block until the result is there, at most the backend's timeout."""
        if not self._done:
            self._backend.poll_until(lambda: hvd.poll(self._handle), self._what)
            output = hvd.synchronize(self._handle)
            if self._finish is not None:
                self._finish(output)
            self._done = True
        return None

    def is_completed(self) -> bool:
        """Say whether `wait` would return at once."""
        return self._done or bool(hvd.poll(self._handle))


class HorovodWire(Wire):
    """A wire over one of Horovod's process sets.

    Horovod matches operations by name. Here they get numbered names, so that they match by order, as everywhere else;
    a number comes back after `_NAMES` others, so that Horovod's cache can know it.
    """

    _OPS: ClassVar[dict[str, int]] = {"sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max, "product": hvd.Product}

    def __init__(
        self, backend: HorovodBackend, ranks: Sequence[int], process_set: Any, label: str, channel: int = 0
    ) -> None:
        super().__init__(list(ranks).index(backend.rank), ranks, backend.wire_device)
        self._channel = channel
        self._backend = backend
        self._set = process_set
        self._label = label
        self._count = 0
        self._in_flight: dict[str, HorovodWork] = {}

    def all_reduce_(self, tensor: Tensor, op: WireOp) -> Work:
        """Start hvd.allreduce_async_; 8-bit integers, which it does not reduce, travel as 32-bit ones and wrap around."""
        if tensor.dtype in (torch.uint8, torch.int8):
            wide = tensor.to(torch.int32)
            return self._start(
                "allreduce",
                lambda name: hvd.allreduce_async_(wide, name=name, op=self._OPS[op], process_set=self._set),
                tensor.copy_,
            )
        return self._start(
            "allreduce", lambda name: hvd.allreduce_async_(tensor, name=name, op=self._OPS[op], process_set=self._set)
        )

    def all_gather_into(self, out: Tensor, tensor: Tensor) -> Work:
        """Start hvd.allgather_async."""
        flat = tensor.reshape(-1)
        return self._start(
            "allgather",
            lambda name: hvd.allgather_async(flat, name=name, process_set=self._set),
            lambda output: out.copy_(output.view(out.shape)),
        )

    def all_to_all_into(self, out: Tensor, tensor: Tensor, receive: Sequence[int], send: Sequence[int]) -> Work:
        """Start hvd.alltoall_async."""
        splits = torch.tensor(list(send), dtype=torch.int32)
        return self._start(
            "alltoall",
            lambda name: hvd.alltoall_async(tensor, splits=splits, name=name, process_set=self._set),
            lambda output: out.copy_(output[0] if isinstance(output, tuple) else output),
        )

    def broadcast_(self, tensor: Tensor, src: int) -> Work:
        """Start hvd.broadcast_async_."""
        root = self.ranks[src]
        return self._start(
            "broadcast", lambda name: hvd.broadcast_async_(tensor, root, name=name, process_set=self._set)
        )

    def barrier(self) -> Work:
        """Start an all-reduce of one element: Horovod's own barrier cannot be waited for with a bound."""
        return self.all_reduce_(torch.zeros(1, dtype=torch.int32, device=self.device), "sum")

    def send_receive(self, sent: Tensor | None, dst: int | None, out: Tensor | None, src: int | None) -> Work:
        """Pass them beside Horovod, which has no messages between two ranks; GPU tensors come through the CPU."""
        to, source = (None if peer is None else self.ranks[peer] for peer in (dst, src))
        if self.device.type == "cpu":
            return self._backend.pairs.send_receive(sent, to, out, source, self._channel)
        room = None if out is None else torch.empty_like(out, device="cpu")
        work = self._backend.pairs.send_receive(None if sent is None else sent.cpu(), to, room, source, self._channel)
        return work if out is None or room is None else Then(work, lambda: out.copy_(room))

    def reduce_scatter_into(self, out: Tensor, tensor: Tensor, op: WireOp) -> Work:
        """Start hvd.reducescatter_async for sums; for the rest Horovod has none."""
        if op != "sum" or tensor.dtype in (torch.uint8, torch.int8):
            return super().reduce_scatter_into(out, tensor, op)
        flat = tensor.reshape(self.size, -1)
        return self._start(
            "reducescatter",
            lambda name: hvd.reducescatter_async(flat, name=name, op=hvd.Sum, process_set=self._set),
            lambda output: out.copy_(output.view(out.shape)),
        )

    def _start(self, kind: str, start: Callable[[str], int], finish: Callable[[Any], Any] | None = None) -> HorovodWork:
        name = f"hvdtrain.{self._label}.{self._count % _NAMES}"
        self._count += 1
        earlier = self._in_flight.pop(name, None)
        if earlier is not None:
            earlier.wait()
        work = HorovodWork(self._backend, start(name), f"{kind} {name!r}", finish)
        self._in_flight[name] = work
        return work


class HorovodReplica(HookedReplica):
    """Packs of gradients in Horovod's all-reduce."""

    _suitable_bucket_bytes = 4 * 2**20
    _backend: HorovodBackend

    def __init__(
        self, backend: HorovodBackend, module: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions
    ) -> None:
        self._adasum = backend.op == "adasum"
        self._engine_averages = (
            self._adasum
        )  # each rank's own mean gradient goes in, and a combination of them comes out
        compression = backend.compression
        groups = 0 if self._adasum and backend.num_groups is None else backend.num_groups  # Adasum weighs each tensor
        super().__init__(
            backend, module, optimizer, options, carried=lambda dtype: _carried(dtype, compression), groups=groups
        )

    def _send(self, pack: Pack) -> Work:
        backend = self._backend
        if backend.compression == "bf16" and pack.tensors[0].dtype == torch.bfloat16:
            return Bf16Sum(backend, pack.name, pack.tensors)
        op = hvd.Adasum if self._adasum else hvd.Sum
        factor = backend.gradient_predivide_factor
        scales = {} if factor == 1.0 else {"prescale_factor": 1.0 / factor, "postscale_factor": factor}
        name = f"gradient.{pack.name}"
        if len(pack.tensors) == 1:
            handle = hvd.allreduce_async_(pack.tensors[0].view(-1), name=name, op=op, **scales)
        else:
            handle = hvd.grouped_allreduce_async_(pack.tensors, name=name, op=op, **scales)
        names = [self._names[id(p)] for p in pack.parameters]
        return HorovodWork(
            backend, handle, f"the gradients of {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        )

    def _scale(self, tally: Tally) -> None:
        if self._adasum and tally.ranks < self._backend.world_size:
            raise ConfigError(
                "--horovod.op adasum combines one gradient of every rank, and some rank has no sample in this step; use a data set or "
                "batch size that gives every rank samples"
            )
        super()._scale(tally)


class Bf16Sum:
    """A sum of bfloat16 tensors over the world in half the bytes of float32, by engines that know no bfloat16.

    Every rank receives its slice of all ranks' tensors as raw bytes, sums it in float32, rounds once, and all gather the
    slices. Two exchanges instead of one, as in a ring; the second starts in `advance`.
    """

    def __init__(self, backend: HorovodBackend, name: str, tensors: list[Tensor]) -> None:
        self._backend, self._name, self._tensors = backend, name, tensors
        n = backend.world_size
        flat = torch.cat([t.reshape(-1) for t in tensors])
        self._numel = flat.numel()
        self._slice = -(-self._numel // n)
        padded = torch.zeros(self._slice * n, dtype=torch.bfloat16, device=flat.device)
        padded[: self._numel] = flat
        sent = padded.view(torch.uint8)
        splits = torch.full((n,), self._slice * 2, dtype=torch.int32)
        handle = hvd.alltoall_async(sent, splits=splits, name=f"bf16.{name}")
        self._first: HorovodWork | None = HorovodWork(backend, handle, f"bf16 exchange of {name}", self._sum)
        self._second: HorovodWork | None = None

    def advance(self) -> None:
        """Wait for the first exchange and start the second."""
        if self._first is not None:
            self._first.wait()
            self._first = None

    def wait(self) -> object:
        """Block until the tensors hold the sum."""
        self.advance()
        assert self._second is not None
        return self._second.wait()

    def is_completed(self) -> bool:
        """Say whether `wait` would return at once."""
        return self._first is None and self._second is not None and self._second.is_completed()

    def _sum(self, output: Any) -> None:
        received = output[0] if isinstance(output, tuple) else output
        mine = received.view(torch.bfloat16).view(self._backend.world_size, self._slice)
        total = mine.float().sum(0).bfloat16()
        handle = hvd.allgather_async(total.view(torch.uint8), name=f"bf16.{self._name}.gather")
        self._second = HorovodWork(self._backend, handle, f"bf16 exchange of {self._name}", self._copy_out)

    def _copy_out(self, output: Tensor) -> None:
        whole = output.view(torch.bfloat16)[: self._numel]
        for tensor, part in zip(self._tensors, whole.split([t.numel() for t in self._tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _carried(dtype: torch.dtype, compression: str) -> torch.dtype:
    """The dtype in which gradients of ``dtype`` are sent. Horovod has no bfloat16, and halves overflow when summed."""
    if compression != "none":
        return torch.float16 if compression == "fp16" else torch.bfloat16
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"--horovod.{name} {value}: use one of {', '.join(choices)}")
    return value


# -- the end of the process -------------------------------------------------------------------------------------------


class _End:
    """How this process must end, if Horovod could not be shut down."""

    code: int | None = None


_end = _End()


def _end_without_horovod() -> None:
    """The last thing that Python calls at exit: leave before Horovod's destructors, which would wait for ever."""
    if _end.code is not None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_end.code)


# Handlers run in reverse order, so that this one, registered when this module is imported, comes after nearly all others.
atexit.register(_end_without_horovod)


def _shut_down(timeout_s: float) -> bool:
    """Shut Horovod down within a bound; return whether it did."""
    atexit.unregister(hvd.mpi_ops._basics.shutdown)  # horovod's own, without a bound
    if not hvd.is_initialized():
        return True
    thread = threading.Thread(target=hvd.shutdown, name="hvdtrain-shutdown", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        _end.code = _end.code if _end.code is not None else 1
        return False
    return True


def _code_of(error: BaseException) -> int:
    return error.exit_code if isinstance(error, HvdtrainError) else 1
