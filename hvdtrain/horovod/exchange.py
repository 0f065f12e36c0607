"""The gradients of one `DistributedOptimizer` on their way: which of them travel together, and when.

Hooks notice when a gradient is complete. Gradients travel in packs, the same on every rank: small ones copied together, large
ones as they lie; a pack leaves when its last gradient is there. This is the way of `hvdtrain.backends.hooked`, with Horovod's
rules of what a gradient is complete after, and each pack a named operation, so that ranks may join and orders may differ.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.backends.hooked import Pack, make_packs
from hvdtrain.backends.layout import laid_out_like
from hvdtrain.horovod import state
from hvdtrain.horovod.compression import FP16Compressor, NoneCompressor
from hvdtrain.horovod.controller import Controller
from hvdtrain.horovod.operations import sparse_allreduce_async
from hvdtrain.horovod.packing import packed
from hvdtrain.horovod.process_sets import ProcessSet
from hvdtrain.horovod.requests import Request, form

_PACK_BYTES = 8 * 2**20
_TOO_MANY = (
    "gradients were computed more often than backward_passes_per_step={passes} before optimizer.step() (the gradient of {name!r} was "
    "sent already); raise backward_passes_per_step, or call optimizer.step() after each window"
)
_CHANGED = (
    "the gradient of {name!r} was changed while it was on its way to the other ranks, and the change would be lost: call "
    "optimizer.synchronize() after loss.backward(), then clip or unscale, then `with optimizer.skip_synchronize(): optimizer.step()`"
)

Groups = Sequence[Sequence[nn.Parameter]] | int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner:
    """How gradients are exchanged.

    Attributes:
        op: Average or Sum.
        prescale: Multiplies each rank's gradient before.
        postscale: Multiplies the result.
        compression: A compressor.
        groups: What travels together: a number of groups, lists of parameters, or None.
        sparse_as_dense: Sparse gradients travel as dense ones.
        process_set: The ranks that take part.
    """

    op: int
    prescale: float
    postscale: float
    compression: Any
    groups: Groups
    sparse_as_dense: bool
    process_set: ProcessSet


@dataclass(slots=True, eq=False)
class _Window:
    """What is under way between two steps."""

    packs: list[Pack]
    place: dict[int, tuple[Pack, int]]
    fired: set[int] = field(default_factory=set)  # ids of parameters with a gradient since the last step
    left: dict[int, int] = field(default_factory=dict)  # backward passes until a gradient is complete
    requests: dict[str, tuple[Request, Any]] = field(
        default_factory=dict
    )  # by a pack's name, with what decompression needs
    sparse: dict[int, Callable[[], Tensor]] = field(default_factory=dict)
    versions: dict[int, tuple[Tensor, int]] = field(default_factory=dict)  # of gradients when they left
    told: bool = False  # that there was a backward pass too many; who catches it may go on with what was sent


class Exchange:
    """Sends the gradients of some parameters, and brings back what they come to.

    Args:
        named: Names, different for each, and parameters.
        passes: Backward passes after which a gradient is complete.
        manner: How.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], passes: int, manner: Manner) -> None:
        self.passes, self._manner = passes, manner
        self._number = state.next_optimizer()
        self._layouts: dict[tuple[bool, ...], list[Pack]] = {}
        self._sparse: set[int] = set()
        self._window: _Window | None = None
        self._turn = threading.RLock()
        self.names: dict[int, str] = {}
        self._parameters: list[nn.Parameter] = []
        self.active = bool(manner.process_set.included()) and (manner.process_set.size() or 1) > 1
        for name, parameter in named:
            self.add(name, parameter)

    def add(self, name: str, parameter: nn.Parameter) -> None:
        """Exchange this one too."""
        self.names[id(parameter)] = name
        self._parameters.append(parameter)
        self._layouts.clear()
        if not self.active or not (parameter.is_floating_point() or parameter.is_complex()):
            return
        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # a hook is refused on one that is frozen, and it may be unfrozen later
        parameter.register_post_accumulate_grad_hook(self._on_gradient)
        parameter.requires_grad_(trained)

    @property
    def under_way(self) -> bool:
        """Whether a backward pass has been made since the last step."""
        return self._window is not None and bool(self._window.fired)

    def forget(self) -> None:
        """Begin anew, as after a state was loaded."""
        self._window = None

    def complete(self) -> None:
        """Send what was not sent, and return when every gradient is the ranks' average or sum.

        A gradient that this rank has not is sent as zeros: other ranks may have one.

        Raises:
            RuntimeError: Something has changed a gradient after it was sent.
        """
        with self._turn:
            window = self._opened()
            for pack in window.packs:
                if pack.name not in window.requests:
                    self._take_out_sparse(pack, window)
                    self._send(pack, window)
        controller = self._controller()
        for pack in window.packs:
            controller.wait(window.requests[pack.name][0])
        changed = self._changed(window)
        if changed:
            self._window = None
            raise RuntimeError(_CHANGED.format(name=changed))
        for pack in window.packs:
            self._bring_back(pack, *window.requests[pack.name])
        for parameter in self._parameters:
            if id(parameter) in window.sparse:
                parameter.grad = window.sparse[id(parameter)]()
        self._window = None

    # -- inside -------------------------------------------------------------------------------------------------------

    def _controller(self) -> Controller:
        return state.controller_of(self._manner.process_set, "hvd.DistributedOptimizer")

    def _changed(self, window: _Window) -> str:
        """A parameter whose gradient is not what it was when it left; "" if there is none. One that was taken away arrives."""
        for parameter in [] if window.told else self._parameters:
            sent = window.versions.get(id(parameter))
            if sent is None or parameter.grad is None:
                continue
            gradient, version = sent
            if parameter.grad is not gradient or gradient._version != version:
                return self.names[id(parameter)]
        return ""

    def _opened(self) -> _Window:
        if self._window is None:
            flags = tuple(parameter.requires_grad for parameter in self._parameters)
            if flags not in self._layouts:
                trained = [
                    p for p, flag in zip(self._parameters, flags, strict=True) if flag and id(p) not in self._sparse
                ]
                self._layouts[flags] = self._laid_out(trained)
            packs = self._layouts[flags]
            place = {id(p): (pack, at) for pack in packs for at, p in enumerate(pack.parameters)}
            for pack in packs:
                pack.missing = set(range(len(pack.parameters)))
            self._window = _Window(packs, place)
        return self._window

    def _on_gradient(self, parameter: Tensor) -> None:
        if state.real() is not None or not state.is_initialized():
            return
        with self._turn:
            window = self._opened()
            window.fired.add(id(parameter))
            left = window.left.get(id(parameter), self.passes) - 1
            if left < 0:
                window.told = True
                raise AssertionError(_TOO_MANY.format(passes=self.passes, name=self.names[id(parameter)]))
            window.left[id(parameter)] = left
            if left or id(parameter) in window.sparse:
                return
            if parameter.grad is not None and parameter.grad.is_sparse and not self._manner.sparse_as_dense:
                self._send_sparse(parameter, window)
            pack, at = window.place.get(id(parameter), (None, 0))
            if pack is None:
                return
            pack.missing.discard(at)
            if not pack.missing:
                self._take_out_sparse(pack, window)
                self._send(pack, window)

    def _send_sparse(self, parameter: Tensor, window: _Window) -> None:
        assert parameter.grad is not None
        name = f"optimizer.{self._number}.{self.names[id(parameter)]}"
        window.sparse[id(parameter)] = sparse_allreduce_async(
            parameter.grad, name, self._manner.op, self._manner.process_set
        )

    def _take_out_sparse(self, pack: Pack, window: _Window) -> None:
        """Gradients that turn out to be sparse travel by themselves, from now on on every rank that has one."""
        known = {id(p) for p in pack.parameters if id(p) in window.sparse}
        for parameter in pack.parameters:
            sparse = parameter.grad is not None and parameter.grad.is_sparse and not self._manner.sparse_as_dense
            if sparse and id(parameter) not in known:
                self._send_sparse(parameter, window)
                known.add(id(parameter))
        if known:
            self._sparse |= known
            self._layouts.clear()
            pack.parameters = [p for p in pack.parameters if id(p) not in known]
            pack.buffer, pack.parts = None, ()

    def _laid_out(self, parameters: list[nn.Parameter]) -> list[Pack]:
        compression = self._manner.compression
        own_kind = compression not in (NoneCompressor, FP16Compressor)

        def carried(dtype: torch.dtype) -> torch.dtype:
            return torch.float16 if compression is FP16Compressor and dtype.is_floating_point else dtype

        packs: list[Pack] = []
        for group in _grouped(parameters, self._manner.groups):
            for same in _by_device(group):
                if own_kind or self._manner.groups == 0:
                    packs += [Pack("", [p], p.dtype, flat=False) for p in same]
                else:
                    size = _PACK_BYTES if self._manner.groups is None else 2**62
                    packs += make_packs(same, carried, size, None)
        for at, pack in enumerate(packs):
            pack.name = f"optimizer.{self._number}.pack.{at}.{self.names[id(pack.parameters[0])]}"
        return packs

    def _send(self, pack: Pack, window: _Window) -> None:
        gradients = [self._dense(parameter) for parameter in pack.parameters]
        context: Any = None
        with torch.no_grad():
            if pack.flat:
                tensor = packed(pack, gradients).data
            elif gradients:
                tensor, context = self._manner.compression.compress(gradients[0])
                if not tensor.is_contiguous():
                    tensor = tensor.contiguous()
            else:
                tensor = torch.empty(0)
        manner = self._manner
        asked = form(
            "allreduce", pack.name, [tensor], op=manner.op, prescale=manner.prescale, postscale=manner.postscale
        )
        request = Request(asked, tensors=[tensor], outputs=[tensor])
        self._controller().submit(request)
        window.requests[pack.name] = (request, context)
        for parameter in pack.parameters:
            assert parameter.grad is not None
            window.versions[id(parameter)] = (parameter.grad, parameter.grad._version)

    def _dense(self, parameter: nn.Parameter) -> Tensor:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, requires_grad=False)
        # Not detach(): what the exchange writes must not look like a change of the user's.
        return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad.data

    def _bring_back(self, pack: Pack, request: Request, context: Any) -> None:
        with torch.no_grad():
            if pack.flat:
                received: Sequence[Tensor] = pack.parts
            else:
                received = [
                    self._manner.compression.decompress(one, context) for one in request.tensors[: len(pack.parameters)]
                ]
            for parameter, tensor in zip(pack.parameters, received, strict=True):
                grad = parameter.grad
                if grad is not None and grad.is_sparse:
                    parameter.grad = tensor.to(grad.dtype).to_sparse(grad.sparse_dim())
                elif grad is not None and grad.dtype != tensor.dtype:
                    grad.copy_(tensor)
                elif pack.flat and tensor.dtype == parameter.dtype:
                    # Where it lies, as DistributedDataParallel's gradient_as_bucket_view; a new view, which tells who keeps it.
                    parameter.grad = tensor.view(parameter.shape)
                else:
                    parameter.grad = laid_out_like(tensor.to(parameter.dtype).view(parameter.shape), parameter)


def _grouped(parameters: list[nn.Parameter], groups: Groups) -> list[list[nn.Parameter]]:
    """What the user wants to travel together; in about the order in which backward completes gradients."""
    if groups is None or groups == 0:
        return [parameters[::-1]]
    if isinstance(groups, int):
        count = min(groups, len(parameters)) or 1
        bounds = [len(parameters) * at // count for at in range(count + 1)]
        return [parameters[begin:end] for begin, end in pairwise(bounds) if end > begin]
    trained = {id(parameter) for parameter in parameters}
    chosen = [[p for p in group if id(p) in trained] for group in groups]
    named = {id(p) for group in chosen for p in group}
    return [group for group in [*chosen, *([p] for p in parameters if id(p) not in named)] if group]


def _by_device(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    found: dict[torch.device, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.device, []).append(parameter)
    return list(found.values())
