"""How gradients and optimizer states lie in memory: as their parameters do.

torch's fused optimizers go over a parameter, its gradient and its states as rows of memory. On CPUs they do so without a
look at the strides (seen in torch 2.13): a gradient that lies otherwise, as a contiguous one of a channels-last parameter
does, would go to other numbers, without a word.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def lying_like(row: Tensor, parameter: Tensor) -> Tensor:
    """A row of contiguous memory as a tensor of a parameter's shape that lies as the parameter does, without a gap."""
    if parameter.is_contiguous():
        return row.view(parameter.shape)
    strides = torch.empty_like(parameter, device="meta").stride()
    return row.as_strided(parameter.shape, strides, row.storage_offset())


def bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, flat, as uint8; of one number too, whose strides may be any, which `reshape` keeps."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def laid_out_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor, or a copy of it that lies as a parameter of its shape does."""
    if tensor.shape != parameter.shape or tensor.layout != torch.strided or tensor.stride() == parameter.stride():
        return tensor
    if tensor.is_contiguous() and parameter.is_contiguous():  # strides of dimensions of size 1 say nothing
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device, requires_grad=False).copy_(tensor)


_following: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def lay_out_what_is_loaded(optimizer: Optimizer) -> None:
    """Let states that anybody loads into an optimizer from now on lie as their parameters do."""
    if optimizer in _following:
        return
    _following.add(optimizer)
    ours = hasattr(optimizer, "_optimizer_load_state_dict_post_hooks")  # an optimizer, or what hands all on to one
    if ours and getattr(type(optimizer), "load_state_dict", Optimizer.load_state_dict) is Optimizer.load_state_dict:
        optimizer.register_load_state_dict_post_hook(lay_out_states)
        return
    plain = optimizer.load_state_dict  # one of its own, in which torch's hooks may not run

    @functools.wraps(plain)
    def load_state_dict(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        lay_out_states(optimizer)
        return result

    optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]


def lay_out_states(optimizer: Optimizer) -> None:
    """Let an optimizer's states, which may come from a file or from another rank, lie as their parameters do."""
    for parameter, state in getattr(optimizer, "state", {}).items():
        for name, value in state.items():
            if isinstance(value, Tensor) and isinstance(parameter, Tensor):
                state[name] = laid_out_like(value.detach(), parameter)
