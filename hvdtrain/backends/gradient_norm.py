"""The L2 norm of gradients, and clipping by it: also of sparse ones, and of types that have too few digits for a norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from hvdtrain.backends.keeper import values

_NARROW = (torch.bfloat16, torch.float16)


def norm_of(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the norm over all gradients: float64 if they are, else float32; 0, on the device, if there are none."""
    numbers = [values(gradient) for gradient in gradients]
    if not numbers:
        return torch.zeros((), device=device)
    norms = [torch.linalg.vector_norm(v, dtype=torch.float32 if v.dtype in _NARROW else None) for v in numbers]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def clip_(parameters: Sequence[nn.Parameter], clip_norm: float, device: torch.device) -> Tensor:
    """Scale the parameters' gradients to at most a norm, and return the norm that they had."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(gradient.is_sparse or gradient.dtype in _NARROW for gradient in gradients):
        return nn.utils.clip_grad_norm_(parameters, clip_norm)
    norm = norm_of(gradients, device)
    shrink_(gradients, norm, clip_norm)
    return norm


def shrink_(gradients: Iterable[Tensor], norm: Tensor, clip_norm: float) -> None:
    """Scale gradients of this norm to at most another."""
    factor = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)  # torch.nn.utils.clip_grad_norm_ has the same 1e-6
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.dtype))
