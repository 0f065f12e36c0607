"""Whether what a metric gives is one number."""

from __future__ import annotations

import numbers

import numpy as np
import torch
from torch import Tensor


def scalar(value: object) -> Tensor | str:
    """A metric's value, or what it is instead of one."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.dim() or value.is_complex() or value.layout != torch.strided:
            return f"has shape {tuple(value.shape)}" if value.dim() else f"is of type {value.dtype}"
        return value
    if isinstance(value, (numbers.Real, np.bool_)) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf"):
        array = np.asarray(value, dtype=np.float64)
        return f"has shape {array.shape}" if array.ndim else torch.as_tensor(float(array), dtype=torch.float64)
    return f"is a {type(value).__name__}"
