"""`HorovodBackend`: settings, joining, wire and replica put together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from hvdtrain.backends.base import Backend
from hvdtrain.backends.group import Group
from hvdtrain.backends.hvd import settings
from hvdtrain.backends.hvd.joining import Joining
from hvdtrain.backends.hvd.library import built_with, hvd, version
from hvdtrain.backends.hvd.pairs import Pairs
from hvdtrain.backends.hvd.replica import HorovodReplica
from hvdtrain.backends.hvd.stamp import why_not
from hvdtrain.backends.hvd.waiting import Waiter, shut_down
from hvdtrain.backends.hvd.wire import HorovodWire
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.replica_options import ReplicaOptions
from hvdtrain.errors import ConfigError, LaunchError
from hvdtrain.launch.detect import Detection
from hvdtrain.ranks.exit import code_of, end_hard, prepare
from hvdtrain.ranks.rendezvous import Announce
from hvdtrain.settings.horovod_config import DYNAMIC_TIMELINE, HorovodConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer

_log = logging.getLogger(__name__)

_SHUTDOWN_S = 3.0  # a failed rank gives Horovod's own shutdown so long before it ends without


class HorovodBackend(Backend):
    """Horovod under horovodrun, mpirun, srun or `hvdtrain.spawn`.

    Args:
        detection: Of any launcher but torchrun.
        process_sets: Allow `group`; costs a little in each cycle.
        options: Horovod's settings, the fields of `HorovodConfig`; the rest as for `Backend`.
    """

    name = "horovod"
    restartable: ClassVar[bool] = False  # MPI cannot be initialised twice

    def __init__(self, detection: Detection, *, process_sets: bool = True, **options: Any) -> None:
        own = {name: options.pop(name) for name in settings.NAMES if name in options}
        super().__init__(detection, **options)
        config = HorovodConfig(process_sets=process_sets, **own)
        if self.all_reduce_family == "hierarchical":
            config = replace(config, hierarchical_allreduce=True)
        topology = self.topology
        settings.check(config, topology.world_size, mpi=bool(hvd.mpi_built()), nccl=bool(hvd.nccl_built()))
        if (config.hierarchical_allreduce or config.hierarchical_allgather) and topology.num_nodes == 1:
            _log.warning("Horovod does nothing hierarchical on one node; --horovod.hierarchical-* have no effect here")
        self.config = config
        self._joining = Joining(
            detection,
            self.timeout_s,
            asked=settings.variables(config),
            preferred=settings.defaults(config),
            gpu=self._gpu,
            all_reduce=self.all_reduce_family,
        )
        self._process_sets: dict[tuple[int, ...], Any] = {}
        self._groups_made = 0

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
            return f"Horovod {version()}"
        carrier = "NCCL" if self._gpu else "MPI" if hvd.mpi_enabled() else "Gloo"
        return f"Horovod {version()}, {carrier}"

    # -- life ---------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if hvd.is_initialized():
            raise LaunchError(
                "Horovod is already initialised in this process; let hvdtrain.init() do it, and drop hvd.init()"
            )
        prepare()
        meeting = self._meet()
        self._joining.join(meeting.store.under("engine"), self._waiter)
        self._pairs = Pairs(meeting.store, self.rank, self.timeout_s, self._watch, one_node=meeting.one_node)
        self._wire = self._make_wire(range(self.world_size), hvd.global_process_set, "world", 0)

    def _software(self) -> dict[str, str]:
        return {**super()._software(), "Horovod": built_with()}

    def _announce(self) -> Announce | None:
        return self._joining.announce(self._waiter)

    def _disconnect(self) -> None:
        self._pairs.close()
        if not shut_down(self.timeout_s):
            end_hard(1)
        self._joining.close()

    def _kill(self, error: BaseException) -> None:
        # Horovod joins its thread when the process ends, and that thread may wait in MPI for ranks that are gone.
        if not shut_down(_SHUTDOWN_S):
            end_hard(code_of(error))

    def begin_engine_trace(self, path: Path) -> bool:
        """Horovod's timeline, where it was told at its start that one may come (``timeline="DYNAMIC"``)."""
        if self.config.timeline != DYNAMIC_TIMELINE:
            return False
        hvd.start_timeline(str(path))
        return True

    def end_engine_trace(self) -> None:
        """End Horovod's timeline."""
        hvd.stop_timeline()

    # -- work ---------------------------------------------------------------------------------------------------------

    def _replicate(self, model: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions) -> Replica:
        return HorovodReplica(self, model, optimizer, options, config=self.config, waiter=self._waiter)

    def _check_exchange(self, asked: str) -> None:
        self.config.check_exchange(asked)

    def _group(self, ranks: list[int]) -> Group | None:
        self._groups_made += 1
        key = tuple(ranks)
        if len(ranks) == self.world_size:
            process_set = hvd.global_process_set
        elif key in self._process_sets:
            process_set = self._process_sets[key]
        else:
            if not self.config.process_sets:
                raise ConfigError("groups of ranks need Horovod's process sets; leave --horovod.no-process-sets out")
            with self.region("groups", f"making the group {ranks}"):
                process_set = self._waiter.call(lambda: hvd.add_process_set(ranks), f"add_process_set({ranks})")
            self._process_sets[key] = process_set
        if self.rank not in ranks:
            return None
        wire = self._make_wire(ranks, process_set, f"group{self._groups_made}", self._groups_made)
        return Group(wire, self._watch, check=self._check, label=f"group {ranks}")

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _gpu(self) -> bool:
        return self.device.type == "cuda" and bool(hvd.nccl_built())

    @property
    def _waiter(self) -> Waiter:
        return Waiter(self.timeout_s, self._watch, f"rank {self.rank} of {self.world_size}")

    def _make_wire(self, ranks: Sequence[int], process_set: Any, label: str, channel: int) -> HorovodWire:
        device = self.device if self._gpu else torch.device("cpu")  # without NCCL, Horovod takes CPU tensors
        return HorovodWire(self.rank, ranks, device, process_set, label, self._waiter, self._pairs, channel)
