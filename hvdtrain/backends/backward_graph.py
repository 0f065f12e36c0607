"""Backward passes in which ranks meet: batch normalisation over all ranks, gathered embeddings.

A loss of weight 0 may be anything, NaN as the mean over nothing is, and NaN times zero is NaN: it must not get into a gradient.
But where ranks meet, the others' losses depend on this rank's batch, and what they send back for it does count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

if TYPE_CHECKING:
    from torch.autograd.graph import Node

_Gradients = tuple[Tensor | None, ...]
# Modules of functions that are collectives.
_MEETING = ("hvdtrain.", "torch.distributed.", "torch.nn.modules._functions")
_PASSING = ("torch.distributed.fsdp.",)  # and what hands on gradients as they are


@contextmanager
def nothing_added(loss: Tensor) -> Iterator[None]:
    """Let the gradients of a loss be 0 wherever nothing of another rank's can be in them, whatever comes of its own value."""
    graph = _nodes([loss.grad_fn])
    meeting = [
        node for node in graph if isinstance(node, BackwardCFunction) and not _passes(node)
    ]  # torch's own nodes are each rank's own
    behind = _nodes([following for node in meeting for following, _ in node.next_functions])
    hooks = [node.register_hook(_zeros) for node in graph - behind - set(meeting) if node.next_functions]
    hooks += [node.register_hook(_numbers) for node in meeting]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ranks_meet(loss: Tensor) -> bool:
    """Whether the backward pass of a loss exchanges gradients with the other ranks', as far as their ways to do so are known."""
    return any(
        _module(node).startswith(_MEETING) and not _passes(node)
        for node in _nodes([loss.grad_fn])
        if isinstance(node, BackwardCFunction)
    )


def leaves(loss: Tensor) -> set[Tensor]:
    """The tensors in which a backward pass from a loss leaves gradients."""
    return {node.variable for node in _nodes([loss.grad_fn]) if hasattr(node, "variable")}


def _zeros(gradients: _Gradients, _: _Gradients) -> _Gradients:
    return tuple(None if gradient is None else torch.zeros_like(gradient) for gradient in gradients)


def _numbers(gradients: _Gradients, _: _Gradients) -> _Gradients:
    """What a function of somebody's own makes of zeros, if it does not ask the other ranks, may be NaN too."""

    def number(gradient: Tensor | None) -> Tensor | None:
        if gradient is None or gradient.layout != torch.strided or gradient.is_nested:
            return gradient
        return gradient.masked_fill(gradient.isnan(), 0)

    return tuple(map(number, gradients))


def _module(node: Node) -> str:
    return getattr(getattr(node, "_forward_cls", None), "__module__", "")


def _passes(node: Node) -> bool:
    return _module(node).startswith(_PASSING)


def _nodes(first: list[Node | None]) -> set[Node]:
    """The nodes that a backward pass comes to."""
    found: set[Node] = set()
    ahead = list(first)
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [following for following, _ in node.next_functions]
    return found
