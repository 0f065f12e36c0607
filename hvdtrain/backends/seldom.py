"""The replicas whose ranks, or groups of ranks, train apart and exchange weights every so many steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hvdtrain.backends.apart import Apart
from hvdtrain.backends.communicator import Communicator
from hvdtrain.backends.groups import Groups, groups_of
from hvdtrain.backends.hooked import HookedReplica, Pack
from hvdtrain.backends.replica_options import ReplicaOptions
from hvdtrain.backends.weighting import Tally
from hvdtrain.backends.wire import SelfWire, Together, Work

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from hvdtrain.backends.base import Backend

_SENT_AS = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class SeldomReplica(Apart):
    """Exchanges weights and no gradients."""

    _reuses_gradients = False

    def _weighed_over(self) -> Communicator:
        return Communicator(SelfWire(self._backend.device))  # this rank alone

    def _send_during(self, loss: Tensor, weight: Tensor, tally: Tally, retain_graph: bool) -> None:
        loss.backward(weight, retain_graph=retain_graph)
        self.lap("backward")

    def _send_after(self, tally: Tally, empty: bool) -> None:
        pass

    def _finish(self, empty: bool) -> Tensor:
        return torch.tensor(self._weighting.tally.values(), dtype=torch.float64)

    def _own_weight(self, summed: Tally) -> tuple[float, float | None]:
        return self._weighting.own_weight, self._weighting.total


class SeldomOfGroups(Apart, HookedReplica):
    """Exchanges gradients within a group of ranks, and weights between groups.

    Args:
        options: As for `Replica`; they say a sync and groups.
    """

    def __init__(
        self, backend: Backend, module: nn.Module, optimizer: Optimizer | None, options: ReplicaOptions
    ) -> None:
        self._said = torch.zeros(2)
        self._said_by_all: list[list[float]] = []
        super().__init__(backend, module, optimizer, options, carried=lambda dtype: _SENT_AS.get(dtype, dtype))

    def _find_groups(self) -> Groups | None:
        return groups_of(self._backend, self.options.sync_group, beside=self._sync.delay > 0)

    def _weighed_over(self) -> Communicator:
        assert self._together is not None
        return self._together.within

    @property
    def _over(self) -> Communicator:
        return self._weighed_over()

    def _set_up(self) -> None:
        super()._set_up()
        HookedReplica._set_up(self)

    def _send(self, pack: Pack) -> Work:
        wire = self._weighed_over().wire
        flat = [torch.view_as_real(t).view(-1) if t.is_complex() else t.view(-1) for t in pack.tensors]
        return Together([wire.all_reduce_(tensor, "sum") for tensor in flat])

    def _send_tally(self, tensor: Tensor) -> Work:
        wire, weighting = self._weighed_over().wire, self._weighting
        differ = weighting.own_weight > 0 and weighting.tally.counted > 0 and weighting.total is None
        mine = [weighting.own_weight, math.nan if differ else weighting.total or 0.0]
        self._said = torch.tensor(mine, dtype=torch.float64, device=wire.device)
        self._everyones = torch.empty((wire.size, 2), dtype=torch.float64, device=wire.device)
        return Together([wire.all_reduce_(tensor, "sum"), wire.all_gather_into(self._everyones, self._said)])

    def _own_weight(self, summed: Tally) -> tuple[float, float | None]:
        weights, totals = self._everyones.t().tolist()
        said = {total for total in totals if total}
        return sum(weights), said.pop() if len(said) == 1 and not math.isnan(next(iter(said))) else None
