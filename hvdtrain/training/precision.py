"""Which floating-point numbers a step computes with; nothing else knows.

fp32 and fp64 compute in that type throughout. bf16 and fp16 keep float32 parameters and run the forward pass under
`torch.autocast`; fp16 scales its losses with a `GradScaler`, whose skipped steps agree on all ranks because it looks at
gradients that have been averaged over them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from hvdtrain.data.nested import cast_floating
from hvdtrain.errors import ConfigError

_PARAMETER_DTYPE = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.float32, "fp16": torch.float32}
_AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """One of fp32, fp64, bf16 and fp16, on one device.

    Args:
        name: "fp32", "fp64", "bf16" or "fp16".
        device: Where the model is.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in _PARAMETER_DTYPE:
            raise ConfigError(f"unknown precision {name!r}; use one of {', '.join(_PARAMETER_DTYPE)}")
        self.name = name
        self.dtype = _PARAMETER_DTYPE[name]
        self._device = device
        self._autocast_dtype = _AUTOCAST_DTYPE.get(name)
        self.scaler: GradScaler | None = GradScaler(device.type) if name == "fp16" else None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and its floating-point parameters and buffers to the precision's type, in place.

        Complex ones get the type of two such numbers; ``model.to(dtype)`` would drop their imaginary parts.
        """

        def converted(tensor: Tensor) -> Tensor:
            kind = tensor.dtype
            return tensor.to(
                self.dtype.to_complex() if kind.is_complex else self.dtype if kind.is_floating_point else kind
            )

        model.to(self._device)
        model._apply(converted)
        return model

    def cast(self, batch: Any) -> Any:
        """Return a batch whose floating-point tensors have the type that the model's parameters have (fp64 only)."""
        return cast_floating(batch, self.dtype) if self.dtype == torch.float64 else batch

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass."""
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._autocast_dtype)

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss to call backward on."""
        return loss if self.scaler is None else self.scaler.scale(loss)
