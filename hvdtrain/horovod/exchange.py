"""The gradients of one `DistributedOptimizer` on their way: which of them travel together, and when.

Hooks notice when a gradient is complete. Gradients travel in packs, the same on every rank: small ones copied together, large
ones as they lie; a pack leaves when its last gradient is there. This is the way of `hvdtrain.backends.hooked`, with Horovod's
rules of what a gradient is complete after. A window's packs go in the order of their layout, through the optimizer's `Channel`; or
each as an operation by name, as long as the ranks have not agreed on that layout, and where a channel would not do (`packs`).
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.backends.hooked import Pack
from hvdtrain.backends.layout import laid_out_like
from hvdtrain.errors import HorovodInternalError
from hvdtrain.horovod import state
from hvdtrain.horovod.channel import JOINED, LIVE, Channel
from hvdtrain.horovod.controller import Controller
from hvdtrain.horovod.hooks import Hooks
from hvdtrain.horovod.operations import sparse_allreduce_async
from hvdtrain.horovod.packing import packed
from hvdtrain.horovod.packs import Layout, Manner, contents, laid_out
from hvdtrain.horovod.process_sets import global_process_set
from hvdtrain.horovod.requests import Request, form

_TOO_MANY = (
    "gradients were computed more often than backward_passes_per_step={passes} before optimizer.step() (the gradient of {name!r} was "
    "sent already); raise backward_passes_per_step, or call optimizer.step() after each window"
)
_CHANGED = (
    "the gradient of {name!r} was changed while it was on its way to the other ranks, and the change would be lost: call "
    "optimizer.synchronize() after loss.backward(), then clip or unscale, then `with optimizer.skip_synchronize(): optimizer.step()`"
)
_PAST = (
    "gradients were on their way to the other ranks when hvd.shutdown() was called, and may have arrived on some; call "
    "optimizer.zero_grad() and compute them again"
)
_DROPPED = "optimizer.load_state_dict between backward and step"


@dataclass(slots=True, eq=False)
class _Window:
    """What is under way between two steps."""

    layout: Layout
    channel: Channel | None
    by_name: bool | None  # whether packs go by name; None: the other ranks have not been heard
    job: state.Job
    asked: bool = False  # whether the other ranks were told that it has begun
    held: bool = False  # whether a thread would send what is complete
    sent: int = 0  # packs, where they go in order
    agreeing: Request | None = None
    fired: set[int] = field(default_factory=set)  # ids of parameters with a gradient since the last step
    left: dict[int, int] = field(default_factory=dict)  # backward passes until a gradient is complete
    requests: dict[str, Request] = field(default_factory=dict)  # by a pack's name
    contexts: dict[str, Any] = field(default_factory=dict)  # what decompression needs, by a pack's name
    sparse: dict[int, Callable[[], Tensor]] = field(default_factory=dict)
    versions: dict[int, tuple[Tensor, int]] = field(default_factory=dict)  # of gradients when they were complete
    told: bool = False  # that there was a backward pass too many; who catches it may go on with what was sent

    @property
    def packs(self) -> list[Pack]:
        return self.layout.packs


class Exchange:
    """Sends the gradients of some parameters, and brings back what they come to.

    Args:
        named: Names, different for each, and parameters.
        passes: Backward passes after which a gradient is complete.
        manner: How.

    Raises:
        ValueError: Gradients of one of them are on their way for an older optimizer.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], passes: int, manner: Manner) -> None:
        self.passes, self._manner = passes, manner
        self._number = state.next_optimizer()
        self._layouts: dict[tuple[bool, ...], Layout] = {}
        self._sparse: set[int] = set()
        self._window: _Window | None = None
        self._job: state.Job | None = None
        self._dropped = 0  # windows in this job
        self._turn = threading.RLock()
        self.names: dict[int, str] = {}
        self._parameters: list[nn.Parameter] = []
        self.active = bool(manner.process_set.included()) and (manner.process_set.size() or 1) > 1
        self._hooks = Hooks(self)
        self._hooks.refuse_if_under_way([parameter for _, parameter in named])
        for name, parameter in named:
            self.add(name, parameter)

    def add(self, name: str, parameter: nn.Parameter) -> None:
        """Exchange this one too."""
        self.names[id(parameter)] = name
        self._parameters.append(parameter)
        self._layouts.clear()
        if self.active and (parameter.is_floating_point() or parameter.is_complex()):
            self._hooks.add(parameter)

    @property
    def under_way(self) -> bool:
        """Whether a backward pass has been made since the last step, in this job."""
        return self._window is not None and bool(self._window.fired) and self._window.job is state.job_or_none()

    @property
    def sending(self) -> bool:
        """Whether gradients are on their way that can still arrive."""
        window = self._window
        if window is None or not self.under_way:
            return False
        failed = any(request.error is not None for request in window.requests.values())
        return not (failed or (window.channel is not None and window.channel.over))

    def forget(self) -> None:
        """Begin anew, as after a state was loaded: end the window that is under way with the other ranks, and drop what it brings."""
        window = self._window
        try:
            if window is None or window.job is not state.job():
                return
            self._controller()
        except ValueError:  # there is nobody to end it with
            return
        finally:
            self._window = None
        with suppress(HorovodInternalError):  # the next window is told
            self._exchange_all(window)
            self._dropped += 1  # the others must have dropped it too
        for request in [*window.requests.values(), *([window.agreeing] if window.agreeing is not None else [])]:
            with suppress(HorovodInternalError):
                self._controller().wait(request)

    def forget_the_past(self) -> None:
        """Drop a window of a job that has ended."""
        if self._window is not None and self._window.job is not state.job_or_none():
            self._window = None

    def give_up_window(self, now: int) -> None:
        """Send what is complete, and, where other ranks wait for packs in order, zeros for the rest.

        Args:
            now: What this rank is: one that has joined, and can use its gradients later; or one that has left, and cannot.

        Raises:
            HorovodInternalError: The engine failed.
        """
        with self._turn:
            window = self._window
            if window is None or window.channel is None or window.channel.over:
                return
            if not window.asked and all(pack.missing for pack in window.packs):
                return
            with window.channel.waited_for():
                self._advance(window, wait=True)
                window.channel.finish()
            if not window.by_name and now == JOINED:
                self._window = None

    def complete(self) -> None:
        """Send what was not sent, and return when every gradient is the ranks' average or sum.

        A gradient that this rank has not is sent as zeros: other ranks may have one.

        Raises:
            RuntimeError: Something has changed a gradient after it was sent, a newer optimizer has its parameters, or gradients were on
                their way when a job ended.
            HorovodInternalError: The exchange failed, or a rank has left.
        """
        self._hooks.refuse_if_lost()
        with self._turn:
            window = self._opened()
        self._exchange_all(window)
        changed = self._changed(window)
        if changed:
            self._window = None
            raise RuntimeError(_CHANGED.format(name=changed))
        for pack in window.packs:
            self._bring_back(pack, window.requests[pack.name], window.contexts[pack.name])
        for parameter in self._parameters:
            if id(parameter) in window.sparse:
                parameter.grad = window.sparse[id(parameter)]()
        self._window = None

    # -- inside -------------------------------------------------------------------------------------------------------

    def _controller(self) -> Controller:
        return state.controller_of(self._manner.process_set, "hvd.DistributedOptimizer")

    def _exchange_all(self, window: _Window) -> None:
        """Send what was not sent, and return when all packs have arrived."""
        if window.channel is not None:
            window.channel.release()
            with window.channel.waited_for():
                with self._turn:
                    self._advance(window, wait=True, rest=True)
                window.channel.finish()
        else:
            with self._turn:
                self._advance(window, rest=True)
        if window.by_name:
            self._wait_by_name(window)

    def _wait_by_name(self, window: _Window) -> None:
        controller = self._controller()
        if window.agreeing is not None:
            controller.wait(window.agreeing)
        for pack in window.packs:
            controller.wait(window.requests[pack.name])

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
        self._controller()  # refuses where nothing can be sent
        if self._window is not None and self._window.job is not state.job():
            if self._window.fired:
                raise RuntimeError(_PAST)
            self._window = None
        if self._window is None:
            if self._job is not state.job():
                self._job, self._dropped = state.job(), 0
            layout = self._layout()
            channels = state.job().channels if self._manner.process_set is global_process_set else None
            channel = channels.of(self._number, self) if channels is not None else None
            for pack in layout.packs:
                pack.missing = set(range(len(pack.parameters)))
            self._window = _Window(layout, channel, None if channel is not None else True, state.job())
            if channel is None:
                self._agree(self._window)
        return self._window

    def _layout(self) -> Layout:
        flags = tuple(parameter.requires_grad for parameter in self._parameters)
        if flags not in self._layouts:
            trained = [p for p, flag in zip(self._parameters, flags, strict=True) if flag and id(p) not in self._sparse]
            self._layouts[flags] = laid_out(trained, self._manner, self._number, self.names)
        return self._layouts[flags]

    def _agree(self, window: _Window) -> None:
        """Ask the other ranks whether their layout is the same, so that the next window's packs can go in order."""
        channels, (forms, agreed) = state.job().channels, (window.layout.forms, window.layout.agreed)
        if self._manner.process_set is not global_process_set or channels is None or forms is None or agreed is None:
            return
        if state.job().backend.device.type != "cpu":
            return
        number, me = self._number, weakref.ref(self)
        window.agreeing = Request(agreed, act=lambda: channels.agreed(number, me, forms))
        self._controller().submit(window.agreeing)

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
            if left:
                return
            assert parameter.grad is not None
            window.versions[id(parameter)] = (parameter.grad, parameter.grad._version)
            pack, at = window.layout.place.get(id(parameter), (None, 0))
            if pack is None:
                if id(parameter) in self._sparse:
                    self._send_sparse(parameter, window)
                return
            pack.missing.discard(at)
            if pack.missing:
                return
            if window.by_name is None:
                self._hold(window)
            if window.asked or window.by_name is not None or any(other.missing for other in window.packs):
                self._advance(window)  # else the program waits next, and is quicker by itself

    def _hold(self, window: _Window) -> None:
        if window.channel is not None and not window.held:
            window.held = True
            window.channel.hold(_later(weakref.ref(self), window))

    def _advance(self, window: _Window, *, wait: bool = False, rest: bool = False) -> None:
        """Send the packs that can be sent.

        Args:
            window: The one that is under way.
            wait: Wait until all ranks have begun it.
            rest: Send those too that are not complete.
        """
        if window.by_name is None and not self._heard(window, wait):
            return
        if window.by_name:
            for pack in window.packs:
                if (rest or not pack.missing) and pack.name not in window.requests:
                    self._take_out_sparse(pack, window)
                    self._send_by_name(pack, window)
            return
        assert window.channel is not None
        for pack in window.packs[window.sent :]:
            if pack.missing and not rest:
                return
            window.channel.send(self._request(pack, window))
            window.sent += 1

    def _heard(self, window: _Window, wait: bool) -> bool:
        """Whether it is known how this window's packs go."""
        channel = window.channel
        assert channel is not None
        if not window.asked:
            channels = state.job().channels
            assert channels is not None
            channels.windows += 1
            window.asked = True
            channel.ask(LIVE, channel.number_of(window.layout.forms), self._dropped, at_once=wait)
        if not (wait or channel.answered):
            return False
        try:
            window.by_name = channel.answer() == 0
        except Exception:
            if wait:
                raise
            return False  # whoever waits is told
        if window.by_name:
            self._agree(window)
        return True

    def _send_sparse(self, parameter: Tensor, window: _Window) -> None:
        assert parameter.grad is not None
        if id(parameter) in window.sparse:
            return
        name = f"optimizer.{self._number}.{self.names[id(parameter)]}"
        gradient = parameter.grad if parameter.grad.is_sparse else parameter.grad.to_sparse(1)
        window.sparse[id(parameter)] = sparse_allreduce_async(gradient, name, self._manner.op, self._manner.process_set)

    def _sparse_in(self, pack: Pack) -> set[int]:
        """Ids of parameters whose gradients turn out to be sparse; they travel by themselves from the next window on."""
        if self._manner.sparse_as_dense:
            return set()
        found = {id(p) for p in pack.parameters if p.grad is not None and p.grad.is_sparse}
        if found:
            self._sparse |= found
            self._layouts.clear()
        return found

    def _take_out_sparse(self, pack: Pack, window: _Window) -> None:
        """Where packs go by name, what turns out to be sparse travels by itself at once."""
        found = self._sparse_in(pack)
        if not found:
            return
        for parameter in pack.parameters:
            if id(parameter) in found:
                self._send_sparse(parameter, window)
        pack.parameters = [p for p in pack.parameters if id(p) not in found]
        pack.buffer, pack.parts = None, ()
        window.layout.held[pack.name] = contents(pack, self.names)

    def _request(self, pack: Pack, window: _Window) -> Request:
        """What is sent of a pack, in order."""
        self._sparse_in(pack)
        tensor = self._taken(pack, window)
        assert window.layout.forms is not None
        return self._noted(pack, window, Request(window.layout.forms[window.sent], tensors=[tensor], outputs=[tensor]))

    def _send_by_name(self, pack: Pack, window: _Window) -> None:
        tensor = self._taken(pack, window)
        details = {**self._manner.details, "parameters": window.layout.held[pack.name]}
        if self._dropped:
            details[_DROPPED] = self._dropped
        asked = form("allreduce", pack.name, [tensor], **details)
        self._controller().submit(self._noted(pack, window, Request(asked, tensors=[tensor], outputs=[tensor])))

    def _taken(self, pack: Pack, window: _Window) -> Tensor:
        """A pack's gradients as what is sent."""
        gradients = [self._dense(parameter, window) for parameter in pack.parameters]
        context: Any = None
        with torch.no_grad():
            if pack.flat:
                tensor = packed(pack, gradients).data
            elif gradients:
                tensor, context = self._manner.compression.compress(gradients[0])
                if not tensor.is_contiguous():
                    tensor = tensor.contiguous()
            else:
                tensor = torch.empty(0, device="cpu")
        window.contexts[pack.name] = context
        return tensor

    def _noted(self, pack: Pack, window: _Window, request: Request) -> Request:
        request.began = time.monotonic()
        window.requests[pack.name] = request
        return request

    def _dense(self, parameter: nn.Parameter, window: _Window) -> Tensor:
        """A gradient as it was when it was complete, though it may have been taken away since; zeros where there is none."""
        if id(parameter) not in window.versions:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, requires_grad=False)
            window.versions[id(parameter)] = (parameter.grad, parameter.grad._version)
        gradient, _ = window.versions[id(parameter)]
        # Not detach(): what the exchange writes must not look like a change of the user's.
        return gradient.to_dense() if gradient.is_sparse else gradient.data

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
                    # Where it lies, as DistributedDataParallel's gradient_as_bucket_view; a new view, which tells who keeps it,
                    # and whose version is its own, not that of all that lie in the buffer.
                    parameter.grad = tensor.data.view(parameter.shape)
                else:
                    parameter.grad = laid_out_like(tensor.to(parameter.dtype).view(parameter.shape), parameter)


def _later(exchange: weakref.ref[Exchange], window: _Window) -> Callable[[], bool]:
    """Sends what is complete, once all ranks have begun the window; says whether nothing is left to do."""

    def send() -> bool:
        sender = exchange()
        if sender is None or window.channel is None or window.channel.troubled:
            return True
        with sender._turn:
            if sender._window is window and window.by_name is None:
                sender._advance(window)
            return sender._window is not window or window.by_name is not None

    return send
