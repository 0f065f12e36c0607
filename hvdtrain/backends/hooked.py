"""Gradients that leave while backward runs, for engines that bring collectives but no wrapper of their own.

A hook on each parameter notices when its gradient is final; gradients travel in packs, a pack as soon as its last one
is there. What this module owns: which gradients form a pack, copies where a gradient cannot be sent as it lies, what
happens to gradients that are missing on some ranks, and the order in which results are waited for. A pack is sent by the
wire's all-reduce, unless an engine has a better way. It does not clip, scale or step: that is `Replica`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hvdtrain.backends.layout import lying_like
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.replica_options import ReplicaOptions
from hvdtrain.backends.slips import unused
from hvdtrain.backends.sparse import sparse_parameters, sum_sparse, unexpected
from hvdtrain.backends.weighting import Tally
from hvdtrain.backends.wire import Together, Work
from hvdtrain.errors import TrainingError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from hvdtrain.backends.base import Backend
    from hvdtrain.backends.communicator import Communicator


@dataclass(slots=True, eq=False)
class Pack:
    """Gradients that are sent together.

    Attributes:
        name: The same on every rank, different for every pack.
        parameters: In the order in which they are packed; all of one dtype.
        dtype: What is sent.
        flat: Copy them into one buffer; otherwise each is sent as it lies.
    """

    name: str
    parameters: list[nn.Parameter]
    dtype: torch.dtype
    flat: bool
    missing: set[int] = field(default_factory=set)  # positions whose gradients are not there yet
    buffer: Tensor | None = None
    parts: tuple[Tensor, ...] = ()  # of the buffer, one a parameter, which lies as that does
    tensors: list[Tensor] = field(default_factory=list)  # what is sent, contiguous
    work: Work | None = None


@runtime_checkable
class StagedWork(Protocol):
    """A `Work` of two exchanges, the second of which must be started."""

    def advance(self) -> None:
        """Wait for the first exchange and start the second."""


class HookedReplica(Replica):
    """A replica whose gradients are sent from hooks, in packs.

    Args:
        carried: The dtype in which an engine sends gradients of a given dtype, unless the options say one; None for their own.
        groups: None: packs of about ``bucket_bytes``, flattened. 0: each gradient by itself. N: N packs, each
            parameter's gradient sent as it lies.
        options: As for `Replica`.
    """

    # Whether the engine matches operations by their order, not by name: packs are then sent in the same on every rank.
    _by_order = True
    _engine_averages = False
    _suitable_bucket_bytes = 8 * 2**20
    _own_hooks = 1
    owns_hooks = True

    def __init__(
        self,
        backend: Backend,
        module: nn.Module,
        optimizer: Optimizer | None,
        options: ReplicaOptions,
        *,
        carried: Callable[[torch.dtype], torch.dtype] | None = None,
        groups: int | None = None,
    ) -> None:
        wanted = options.reduce_dtype
        self._carried = (carried or (lambda dtype: dtype)) if wanted is None else lambda _: wanted
        self._groups = groups
        self._armed = False
        self._hooks: list[RemovableHandle] = []
        super().__init__(backend, module, optimizer, options)

    # -- what engines may do otherwise --------------------------------------------------------------------------------

    def _send(self, pack: Pack) -> Work:
        """Begin to sum ``pack.tensors`` over the ranks, in place."""
        return Together([self._over.wire.all_reduce_(tensor, "sum") for tensor in pack.tensors])

    def _send_tally(self, tensor: Tensor) -> Work:
        """Begin to sum ``tensor`` over the ranks, in place."""
        return self._over.wire.all_reduce_(tensor, "sum")

    # -- Replica ------------------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._names = {id(p): name for name, p in self.module.named_parameters()}
        self._sparse = sparse_parameters(self.module)
        dense = [p for p in reversed(self._parameters) if id(p) not in self._sparse and p.numel()]
        self._packs = self._make_packs(dense)
        self._place = {id(p): (pack, at) for pack in self._packs for at, p in enumerate(pack.parameters)}
        self._sent: list[Pack] = []
        self._lacking: list[str] = []  # parameters without a gradient, which is an error
        self._sums: dict[int, Tensor] = {}  # of sparse gradients
        self._nobody: set[int] = set()  # parameters that no rank used
        self._hooks = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in dense]

    def _send_during(self, loss: Tensor, weight: Tensor, tally: Tally, retain_graph: bool) -> None:
        self._expect(tally)
        loss.backward(weight, retain_graph=retain_graph)
        self.lap("backward")
        self._send_rest(False)

    def _send_after(self, tally: Tally, empty: bool) -> None:
        self._expect(tally)
        self._send_rest(empty)

    def _finish(self, empty: bool) -> Tensor:
        if self._lacking:
            raise unused(self._lacking, self._backend.rank)
        for pack in self._sent:
            if isinstance(pack.work, StagedWork):
                pack.work.advance()
        for pack in self._sent:
            assert pack.work is not None
            pack.work.wait()
            self._unpack(pack)
        for parameter in self._parameters:
            if id(parameter) in self._sums:
                parameter.grad = self._sums[id(parameter)]
            if id(parameter) in self._nobody:
                parameter.grad = None
        self._sums.clear()
        self._tally_work.wait()
        return self._summed

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _over(self) -> Communicator:
        """Whose gradients are summed."""
        return self._backend

    def _make_packs(self, dense: list[nn.Parameter]) -> list[Pack]:
        """Divide these parameters, in about the order in which backward completes them, among packs."""
        return make_packs(dense, self._carried, self.bucket_bytes, self._groups)

    def _expect(self, tally: Tally) -> None:
        """Let gradients leave as they come, and the tally first."""
        self._summed = torch.tensor(tally.values(), dtype=torch.float64, device=self._over.wire.device)
        self._tally_work = self._send_tally(self._summed)
        self._sent = []
        for pack in self._packs:
            pack.missing = set(range(len(pack.parameters)))
            pack.work = None
        self._armed = True

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        pack, at = self._place[id(parameter)]
        if at not in pack.missing:
            raise TrainingError(
                f"the gradient of {self._names[id(parameter)]!r} was completed twice in one backward pass, and had been sent the "
                "first time. Reentrant activation checkpointing does that: pass use_reentrant=False"
            )
        pack.missing.discard(at)
        if pack.flat:
            self._copy_in(pack, at)
        if not self._by_order:
            if not pack.missing:
                self._dispatch(pack)
            return
        for following in self._packs[len(self._sent) :]:
            if following.missing:
                return
            self._dispatch(following)

    def _dispatch(self, pack: Pack) -> None:
        if pack.flat:
            assert pack.buffer is not None
            pack.tensors = [pack.buffer]
        else:
            pack.tensors = self._as_they_lie(pack)
        pack.work = self._send(pack)
        self._sent.append(pack)

    def _as_they_lie(self, pack: Pack) -> list[Tensor]:
        """What is sent of a pack that is not copied together."""
        device = self._over.wire.device
        return [self._as_it_lies(p, pack.dtype, device) for p in pack.parameters]

    def _as_it_lies(self, parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> Tensor:
        grad = _dense(parameter, self._names)
        if grad.dtype == dtype and grad.is_contiguous() and grad.device == device:
            return grad
        return grad.to(device, dtype, copy=True, memory_format=torch.contiguous_format).contiguous()

    def _copy_in(self, pack: Pack, at: int) -> None:
        if pack.buffer is None:
            total = sum(p.numel() for p in pack.parameters)
            pack.buffer = torch.empty(total, dtype=pack.dtype, device=self._over.wire.device)
            rows = pack.buffer.split([p.numel() for p in pack.parameters])
            pack.parts = tuple(map(lying_like, rows, pack.parameters))
        parameter = pack.parameters[at]
        view = pack.parts[at].view(parameter.shape)  # a new one: who keeps it is noticed by its references
        view.copy_(_dense(parameter, self._names))
        if view.dtype == parameter.dtype and view.device == parameter.device:
            parameter.grad = view  # reduced where it lies, as DDP's gradient_as_bucket_view does

    def _unpack(self, pack: Pack) -> None:
        for parameter, received in zip(pack.parameters, pack.parts if pack.flat else pack.tensors, strict=True):
            tensor = received if pack.flat else received.view(parameter.shape)
            assert parameter.grad is not None
            if parameter.grad.data_ptr() != tensor.data_ptr() or parameter.grad.dtype != tensor.dtype:
                parameter.grad.copy_(tensor)

    def _send_rest(self, empty: bool) -> None:
        """Send what backward could not: zeros for gradients that only other ranks have, sparse ones, and who used what.

        All of it now, so that the exchanges of several replicas follow each other in one order on every rank.
        """
        self._armed = False
        used = [p.grad is not None for p in self._parameters]
        self._lacking = []
        if not (empty or self.options.allows_unused or all(used)):
            self._lacking = [self._names[id(p)] for p in self._parameters if p.grad is None]
            return
        for pack in self._packs:
            if pack.work is not None:
                continue
            for at in sorted(pack.missing):
                parameter = pack.parameters[at]
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if pack.flat:
                    self._copy_in(pack, at)
            self._dispatch(pack)
        self._sums = {id(p): sum_sparse(self._over, p) for p in self._parameters if id(p) in self._sparse}
        self._nobody = set()
        if self.options.allows_unused:
            everywhere = self._over.all_reduce(torch.tensor(used), "max").tolist()
            self._nobody = {id(p) for p, somewhere in zip(self._parameters, everywhere, strict=True) if not somewhere}


def make_packs(
    parameters: Sequence[nn.Parameter],
    carried: Callable[[torch.dtype], torch.dtype],
    bucket_bytes: int,
    groups: int | None,
) -> list[Pack]:
    """Divide parameters among packs; the same on every rank, since it looks at shapes and dtypes alone.

    Args:
        parameters: Dense ones, in about the order in which backward completes them.
        carried: dtype of a gradient -> dtype in which it is sent.
        bucket_bytes: Size of a flat pack; a single gradient of half that size or more travels alone, uncopied.
        groups: See `HookedReplica`.
    """
    packs: list[Pack] = []
    if groups is not None:
        count = groups or len(parameters)
        bounds = [len(parameters) * i // count for i in range(count + 1)]
        for begin, end in pairwise(bounds):
            for same in _by_dtype(parameters[begin:end]):
                packs.append(Pack(f"pack.{len(packs)}", same, carried(same[0].dtype), flat=False))
        return packs
    open_packs: dict[torch.dtype, tuple[Pack, int]] = {}
    for parameter in parameters:
        dtype = carried(parameter.dtype)
        size = parameter.numel() * dtype.itemsize
        alone = size >= bucket_bytes / 2 and dtype == parameter.dtype
        if alone:
            packs.append(Pack(f"pack.{len(packs)}", [parameter], dtype, flat=False))
            continue
        pack, filled = open_packs.get(parameter.dtype, (None, 0))
        if pack is None or filled + size > bucket_bytes:
            pack, filled = Pack(f"pack.{len(packs)}", [], dtype, flat=True), 0
            packs.append(pack)
        pack.parameters.append(parameter)
        open_packs[parameter.dtype] = (pack, filled + size)
    return by_place(packs, parameters)


def by_place(packs: list[Pack], parameters: Sequence[nn.Parameter]) -> list[Pack]:
    """Packs in the order in which they can leave: where they leave in order, none should wait for a later one."""
    place = {id(parameter): at for at, parameter in enumerate(parameters)}
    return sorted(packs, key=lambda pack: place[id(pack.parameters[-1])])


def _by_dtype(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    found: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.dtype, []).append(parameter)
    return list(found.values())


def _dense(parameter: nn.Parameter, names: dict[int, str]) -> Tensor:
    assert parameter.grad is not None
    if parameter.grad.is_sparse:
        raise unexpected(repr(names[id(parameter)]))
    return parameter.grad
