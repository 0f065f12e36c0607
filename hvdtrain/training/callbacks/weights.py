"""A model's weights by name, and other ones in their place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hvdtrain.training.checkpoint import model_state


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's floating-point parameters and buffers themselves, each once, though it may have several names."""
    found = {
        tensor.data_ptr(): (name, tensor) for name, tensor in model_state(model).items() if tensor.is_floating_point()
    }
    return dict(found.values())


@torch.no_grad()
def swap(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Exchange the values of tensors of the same names, one at a time."""
    for name, tensor in some.items():
        kept = tensor.clone()
        tensor.copy_(others[name])
        others[name].copy_(kept)
