"""What others do to a step's gradients behind a replica's back, noticed before the ranks drift apart.

Gradients change hands: backward passes of the replica make them, the engine exchanges them, the user may use and change
them, the optimizer uses them, somebody clears them. Whatever touches them out of turn, or keeps them too long, is refused
or said here, on every engine alike.
"""

from __future__ import annotations

import logging
import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hvdtrain.backends.units import own_part
from hvdtrain.backends.watched import Watched
from hvdtrain.errors import TrainingError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_log = logging.getLogger(__name__)
_LOOKS = 10  # steps in which it is seen whether gradients are kept: who does so does so from the start
# Asked of every parameter in each step: loops in C.
_GRADIENT = operator.attrgetter("grad")
_VERSION = operator.attrgetter("_version")
_HOOKS = operator.attrgetter("_post_accumulate_grad_hooks")
State = tuple[list[Tensor | None], list[int]]  # each gradient, and its version; flat lists, compared at C's speed


class Keeper:
    """Keeps an eye on the gradients of one replica.

    Args:
        watched: Its parameters.
        name_of: A parameter's name, for messages.
    """

    def __init__(self, watched: Watched, name_of: Callable[[nn.Parameter], str]) -> None:
        self._watched = watched
        self._name_of = name_of
        self._made: State | None = None  # as the last backward pass of this step left them
        self._lent: list[Tensor] = []  # those of the last step
        self._looks = _LOOKS
        self._ear = _Ear()

    def state(self) -> State:
        """Return each gradient and its version, to be compared by `differ`."""
        gradients = list(map(_GRADIENT, self._watched.trained))
        try:
            return gradients, list(map(_VERSION, gradients))
        except AttributeError:  # some parameter has none
            return gradients, [-1 if g is None else g._version for g in gradients]

    def note(self) -> None:
        """A backward pass of the replica has made the gradients as they are now."""
        self._made = self.state()

    def forget(self) -> None:
        """The step's gradients are exchanged, or given up: they may change."""
        self._made = None

    def lend(self, reused: bool) -> None:
        """The user has the averaged gradients now; ``reused`` if the next step's will be where they are."""
        made, self._made = self._made, None
        self._ear.heard = None
        if reused and self._looks and made is not None:
            self._looks -= 1
            # Into an engine's buffer. The last list stays: where buffers stay too, Python need not make these objects anew.
            self._lent = [g for g in made[0] if g is not None and g._is_view()]

    def follow(self) -> None:
        """Other parameters are watched now, and the engine has other buffers."""
        self._lent, self._looks = [], max(self._looks, 3)
        if self._ear.attached:
            self.listen()

    def listen(self) -> None:
        """The user's own code follows: hear the gradients that other backward passes make meanwhile."""
        self._ear.attach(self._watched.trained)

    def refuse_late(self) -> None:
        """Use the averaged gradients.

        Raises:
            TrainingError: A backward pass has added to one since.
        """
        if why := self.why_late():
            raise TrainingError(why)

    def why_late(self) -> str:
        """Say which of the averaged gradients a backward pass has added to; "" if none."""
        if self._ear.heard is None:
            return ""
        return (
            f"a backward pass after the exchange has made a gradient of {self._name_of(self._ear.heard)!r} that the other ranks do not have: "
            "loss.backward() was called between replica.reduce_gradients() and the optimizer's step. Add the losses, "
            "replica.backward(loss_1 + loss_2, samples=...), or call replica.clear() and begin the step anew"
        )

    def refuse_foreign(self) -> None:
        """Begin a step: nothing may be there but zeros, which are cleared.

        Raises:
            TrainingError: A parameter holds a gradient.
        """
        if not self._watched.any_gradient():
            return
        foreign = [p for p in self._watched.trained if p.grad is not None]
        for parameter in foreign:
            assert parameter.grad is not None
            if bool(values(parameter.grad).count_nonzero()):
                raise TrainingError(
                    f"{self._name_of(parameter)!r} holds a gradient that no replica.backward() of this step made: loss.backward() was called "
                    "instead, or the last step's gradients were not cleared. Call replica.backward(loss, samples=...), and "
                    "replica.step() or optimizer.zero_grad() after each step"
                )
        for parameter in foreign:  # zeros, from zero_grad(set_to_none=False)
            parameter.grad = None

    def refuse_changes(self) -> None:
        """Go on with a step, or exchange it.

        Raises:
            TrainingError: A gradient is not as the last backward pass left it: the exchange may be under way.
        """
        if self._made is None or not differ(self.state(), self._made):
            return
        gradients, versions = self._made
        for parameter, made, version in zip(self._watched.trained, gradients, versions, strict=True):
            if parameter.grad is not made or (made is not None and made._version != version):
                raise TrainingError(
                    f"the gradient of {self._name_of(parameter)!r} was changed after replica.backward() and before the exchange was complete: by "
                    "another backward pass through it (of another replica's loss, or a plain loss.backward()), by zero_grad(), or by "
                    "hand. Call replica.step() before other backward passes, or freeze what they must not reach; change gradients "
                    "between replica.reduce_gradients() and optimizer.step()"
                )

    def refuse_hooks(self, own: int) -> None:
        """Begin an exchange, with ``own`` post-accumulate hooks of the engine on a parameter.

        Raises:
            TrainingError: A parameter has one more.
        """
        hooks = list(map(_HOOKS, self._watched.trained))
        own += self._ear.attached
        if not any(hooks) or (own and None not in hooks and max(map(len, hooks)) <= own):
            return
        several = [p for p, of in zip(self._watched.trained, hooks, strict=True) if len(of or ()) > own]
        hooked = next((p for p in several if not all(map(_is_ours, p._post_accumulate_grad_hooks.values()))), None)
        if hooked is not None:
            raise TrainingError(
                f"{self._name_of(hooked)!r} has a register_post_accumulate_grad_hook of yours, which would run while gradients leave, on what "
                "is not yet their average (an optimizer in it would step on this rank's own gradient); use Tensor.register_hook for "
                "linear changes, or change gradients between replica.reduce_gradients() and optimizer.step()"
            )

    def look_at_lent(self) -> None:
        """Say so, once, if somebody keeps the last step's gradients, whose memory this step's will be in."""
        if not self._looks:
            return
        lent, self._lent = self._lent, []
        if any(map(operator.gt, _references(lent), _expected(lent))):
            self._looks = 0
            _log.warning(
                "gradients of the last step are still referenced, and this step will overwrite them; keep copies: parameter.grad.clone()"
            )


class _Ear:
    """Hears the gradients that are completed while nobody should complete any, wherever a loss came from.

    Attributes:
        heard: The last parameter that got one.
    """

    owns_hooks = True

    def __init__(self) -> None:
        self.heard: nn.Parameter | None = None
        self._on: list[nn.Parameter] = []
        self._hooks: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether there is a hook on each parameter."""
        return bool(self._hooks)

    def attach(self, parameters: list[nn.Parameter]) -> None:
        """Listen to these parameters, and no others, from now on."""
        if parameters is self._on:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = [p.register_post_accumulate_grad_hook(self._hear) for p in parameters]
        self._on = parameters

    def _hear(self, parameter: Tensor) -> None:
        self.heard = parameter  # type: ignore[assignment]


def _is_ours(hook: object) -> bool:
    """Whether a hook is a replica's own."""
    return getattr(getattr(hook, "__self__", None), "owns_hooks", False)


def differ(now: State, before: State) -> bool:
    """Whether any gradient is another, or was written to."""
    return now[1] != before[1] or not all(map(operator.is_, now[0], before[0]))


def _references(tensors: list[Tensor]) -> list[int]:
    """How often Python refers to each, by this list and the counting too."""
    return [sys.getrefcount(tensor) for tensor in tensors]


def _expected(tensors: list[Tensor]) -> list[int]:
    """What `_references` says where nobody else does: newer versions of torch count C++'s own reference."""
    return [_HELD if tensor._use_count() > 1 else _ALONE for tensor in tensors]


_held = nn.Parameter(torch.empty(0))
_held.grad = torch.empty(0)
_ALONE, _HELD = _references([torch.empty(0)])[0], _references([_held.grad])[0]


def values(gradient: Tensor) -> Tensor:
    """The numbers that a gradient holds, also a sparse one; this rank's of one that is cut over the ranks."""
    gradient = own_part(gradient)
    return gradient.coalesce().values() if gradient.is_sparse else gradient
