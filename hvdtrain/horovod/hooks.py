"""Who is told when a parameter's gradient is complete: the newest `DistributedOptimizer` of that parameter, as long as it lives.

Hooks refer weakly to what they tell, so that an optimizer that nobody refers to any more sends nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_UNDER_WAY = (
    "gradients of these parameters are on their way for an older DistributedOptimizer; call its step() or synchronize() before a new "
    "one is made"
)
_LOST = "parameters of this DistributedOptimizer were given to a newer one, which exchanges their gradients from there on; step that one"


class Told(Protocol):
    """What is told of gradients."""

    _hooks: Hooks

    @property
    def sending(self) -> bool:
        """Whether gradients are on their way."""

    def _on_gradient(self, parameter: Tensor) -> None: ...


class Hooks:
    """Hooks on the parameters of one optimizer.

    Args:
        told: By them.
    """

    def __init__(self, told: Told) -> None:
        self._told = weakref.ref(told)
        self._lost = False

    def refuse_if_under_way(self, parameters: Sequence[nn.Parameter]) -> None:
        """Refuse parameters whose gradients another optimizer is exchanging.

        Raises:
            ValueError: There are such.
        """
        for parameter in parameters:
            older = _older(parameter)
            if older is not None and older.sending and not older._hooks._lost:
                raise ValueError(_UNDER_WAY)

    def refuse_if_lost(self) -> None:
        """Refuse to go on where a newer optimizer has parameters of this one.

        Raises:
            RuntimeError: It is so.
        """
        if self._lost:
            raise RuntimeError(_LOST)

    def add(self, parameter: nn.Parameter) -> None:
        """Tell of this parameter's gradients; nobody else is told of them any more."""
        older = _older(parameter)
        if older is not None and older is not self._told():
            older._hooks._lost = True
        if parameter in _hooked:
            _hooked[parameter][1].remove()
        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # a hook is refused on one that is frozen, and it may be unfrozen later
        handle = parameter.register_post_accumulate_grad_hook(_hook(self._told))
        parameter.requires_grad_(trained)
        _hooked[parameter] = (self._told, handle)


_hooked: Any = WeakTensorKeyDictionary()  # parameter: who is told, and the hook


def _older(parameter: nn.Parameter) -> Told | None:
    if parameter not in _hooked:
        return None
    told: Told | None = _hooked[parameter][0]()
    return told


def _hook(reference: weakref.ref[Told]) -> Callable[[Tensor], None]:
    def on_gradient(parameter: Tensor) -> None:
        told = reference()
        if told is not None:
            told._on_gradient(parameter)

    return on_gradient
