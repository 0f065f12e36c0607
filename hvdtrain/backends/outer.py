"""What becomes of weights that all ranks have in common, once it is known how far the ranks have gone from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvdtrain.settings.sync import Sync


def outer_step(sync: Sync, common: Tensor, way: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """From the common weights on the way to the ranks' average, by SGD with Nesterov's momentum as torch.optim has it.

    Args:
        sync: Learning rate and momentum.
        common: The weights.
        way: From there to the average.
        before: The momentum so far; None for none yet.

    Returns:
        New weights and momentum, which is None where the average is taken as it is.
    """
    if sync.averages:
        return common + way, None
    momentum = way.clone() if before is None else torch.add(way, before, alpha=sync.outer_momentum)
    step = torch.add(way, momentum, alpha=sync.outer_momentum)
    return torch.add(common, step, alpha=sync.outer_lr), momentum


def summable(parameter: nn.Parameter) -> Tensor:
    """A parameter's numbers in a type in which they can be summed."""
    plain = real(parameter)
    return plain.float() if plain.dtype in (torch.float16, torch.bfloat16) else plain


def real(parameter: nn.Parameter) -> Tensor:
    """A parameter's own numbers, complex ones as pairs."""
    plain = parameter.detach()
    return torch.view_as_real(plain) if plain.is_complex() else plain


@torch.no_grad()
def write_(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter the numbers of `summable`."""
    real(parameter).copy_(value)
