"""Sums and cuts over the ranks where all of them compute one loss of one batch, and what their gradients are there.

A tensor is here either alike (equal on every rank, one value that each rank holds a copy of) or own (each rank has
another one). As every rank computes the same loss from what is alike, the gradient of an alike tensor is alike too and must
not be summed over the ranks, as `Communicator.all_reduce` does, whose ranks have losses of their own. The four functions are
two pairs, each the other's gradient, so that they can be differentiated any number of times.

(Megatron-LM's f and g are `copied` and `summed`: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053.)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from hvdtrain.backends.communicator import Communicator


def summed(own: Tensor, communicator: Communicator) -> Tensor:
    """Own to alike: the sum over the ranks. The shapes must be the same; every rank must call it, as all four."""
    return cast(Tensor, _Sum.apply(own, communicator))


def copied(alike: Tensor, communicator: Communicator) -> Tensor:
    """Alike to own: the tensor itself. The gradient is the sum of the ranks' gradients."""
    return cast(Tensor, _Copy.apply(alike, communicator))


def taken(alike: Tensor, columns: range, communicator: Communicator) -> Tensor:
    """Alike to own: some entries of the last dimension, which on all ranks together are all entries, in rank order."""
    return cast(Tensor, _Take.apply(alike, columns, communicator))


def joined(own: Tensor, columns: range, communicator: Communicator) -> Tensor:
    """Own to alike: what `taken` takes apart."""
    return cast(Tensor, _Join.apply(own, columns, communicator))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, communicator: Communicator) -> Tensor:
        ctx.communicator = communicator
        return communicator.all_reduce(own)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return copied(grads[0], ctx.communicator), None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alike: Tensor, communicator: Communicator) -> Tensor:
        ctx.communicator = communicator
        return alike.view_as(alike)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return summed(grads[0], ctx.communicator), None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alike: Tensor, columns: range, communicator: Communicator) -> Tensor:
        ctx.columns, ctx.communicator = columns, communicator
        return alike[..., columns.start : columns.stop].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return joined(grads[0], ctx.columns, ctx.communicator), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, columns: range, communicator: Communicator) -> Tensor:
        ctx.columns, ctx.communicator = columns, communicator
        return torch.cat(communicator.all_gather(own), dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return taken(grads[0], ctx.columns, ctx.communicator), None, None
