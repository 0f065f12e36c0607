"""A pack's gradients side by side in its buffer, which is filled again as long as nobody else holds any of its numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvdtrain.backends.hooked import Pack
from hvdtrain.backends.layout import lying_like

_holders = getattr(torch._C, "_storage_Use_Count", None)  # of a storage: tensors that lie in it, and who else holds it


def packed(pack: Pack, gradients: Sequence[Tensor]) -> Tensor:
    """The gradients in one row: where they lie, after ``zero_grad(set_to_none=False)``; else copied.

    Copied into the buffer of the step before only if nobody holds that step's gradients, which are parts of it.

    Args:
        pack: Whose buffer and parts are made or made anew.
        gradients: Dense ones, one for each parameter of the pack.

    Returns:
        The pack's buffer, of the pack's dtype.
    """
    if pack.buffer is not None and _lie_there(pack, gradients):
        return pack.buffer
    if pack.buffer is None or not _alone(pack):
        sizes = [parameter.numel() for parameter in pack.parameters]
        device = pack.parameters[0].device if pack.parameters else "cpu"
        pack.buffer = torch.empty(sum(sizes), dtype=pack.dtype, device=device)
        pack.parts = tuple(map(lying_like, pack.buffer.split(sizes), pack.parameters))
    if pack.parts:
        torch._foreach_copy_(list(pack.parts), list(gradients))
    return pack.buffer


def _lie_there(pack: Pack, gradients: Sequence[Tensor]) -> bool:
    return all(
        part.data_ptr() == gradient.data_ptr() and part.dtype == gradient.dtype
        for part, gradient in zip(pack.parts, gradients, strict=True)
    )


def _alone(pack: Pack) -> bool:
    """Whether nobody but the pack itself holds its numbers."""
    assert pack.buffer is not None
    if _holders is None:
        return False
    storage = pack.buffer.untyped_storage()
    return bool(_holders(storage._cdata) == len(pack.parts) + 2)  # the parts, the buffer, and this name for the storage
