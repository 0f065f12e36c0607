"""Which floating-point numbers a step computes with, and how images lie in memory; nothing else knows.

fp32 and fp64 compute in that type throughout, and tf32 is fp32 whose matrix products and convolutions may round their factors
to 10 binary digits on a GPU. bf16 and fp16 keep float32 parameters and run the forward pass under `torch.autocast`; fp16
scales its losses with a `GradScaler`, whose skipped steps agree on all ranks because it looks at gradients that have been
averaged over them. bf16-pure has parameters, buffers and inputs of bfloat16 and no autocast; the optimizer must work on
float32 masters (`hvdtrain.optim.master_weights`). With channels_last the numbers of one pixel lie side by side, in weights and
inputs of four dimensions, which convolutions of 16-bit numbers are faster with; shapes and results are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from hvdtrain.data.nested import cast_floating, laid_out
from hvdtrain.errors import ConfigError
from hvdtrain.optim.master_weights import has_masters

_log = logging.getLogger(__name__)

_PARAMETER_DTYPE = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.float32,
    "bf16-pure": torch.bfloat16,
    "fp16": torch.float32,
}
_AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """One of fp32, tf32, fp64, bf16, bf16-pure and fp16, on one device.

    Args:
        name: Which.
        device: Where the model is.
        channels_last: How 4-D tensors lie in memory.
    """

    def __init__(self, name: str, device: torch.device, *, channels_last: bool = False) -> None:
        if name not in _PARAMETER_DTYPE:
            raise ConfigError(f"unknown precision {name!r}; use one of {', '.join(_PARAMETER_DTYPE)}")
        self.name = name
        self.dtype = _PARAMETER_DTYPE[name]
        self.channels_last = channels_last
        self._device = device
        self._autocast_dtype = _AUTOCAST_DTYPE.get(name)
        self.scaler: GradScaler | None = GradScaler(device.type) if name == "fp16" else None
        if name == "tf32" and device.type != "cuda":
            _log.warning("precision tf32 is for GPUs: on %s it is fp32", device.type)

    def prepare(self, model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """Move a model to the device and its floating-point parameters and buffers to the precision's type, in place.

        Complex ones get the type of two such numbers; ``model.to(dtype)`` would drop their imaginary parts.

        Args:
            model: What is to be trained or used.
            optimizer: What trains it.

        Raises:
            ConfigError: The model's parameters are float64 and the precision is not, the optimizer would lose small updates,
                there are no complex numbers of the type, or the model has nothing that could lie channels last.
        """
        self._refuse_to_round(model)
        if self.name == "bf16-pure" and optimizer is not None and not has_masters(optimizer):
            raise ConfigError(
                "precision bf16-pure needs an optimizer that works on float32 masters, or updates smaller than bfloat16's digits are "
                "lost; give the Trainer hvdtrain.MasterWeights(optimizer), made before the schedule"
            )

        def converted(tensor: Tensor) -> Tensor:
            kind = tensor.dtype
            if kind.is_complex and self.dtype == torch.bfloat16:
                raise ConfigError(
                    "precision bf16-pure: there are no complex numbers of bfloat16, and the model has some; use bf16"
                )
            return tensor.to(
                self.dtype.to_complex() if kind.is_complex else self.dtype if kind.is_floating_point else kind
            )

        model.to(self._device)
        model._apply(converted)
        if self.channels_last:
            lie_channels_last(model)
        return model

    def _refuse_to_round(self, model: nn.Module) -> None:
        wide = [name for name, one in model.named_parameters() if one.dtype in (torch.float64, torch.complex128)]
        if wide and self.dtype != torch.float64:
            raise ConfigError(
                f"the model has parameters of float64 ({wide[0]!r}, {len(wide)} in all), which precision {self.name} would round; say "
                "precision='fp64' (--precision fp64) to train in float64, or give a model of float32 (model.float())"
            )

    def cast(self, batch: Any) -> Any:
        """Return a batch whose floating-point tensors have the type that the model's parameters have, if that is not float32.

        With channels_last its 4-D tensors lie so.
        """
        if self.dtype != torch.float32:
            batch = cast_floating(batch, self.dtype)
        return laid_out(batch, torch.channels_last) if self.channels_last else batch

    def arithmetic(self) -> AbstractContextManager[None]:
        """Context of everything that computes; what it sets for the whole process is set back."""
        return _tf32() if self.name == "tf32" and self._device.type == "cuda" else nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass."""
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._autocast_dtype)

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss to call backward on."""
        return loss if self.scaler is None else self.scaler.scale(loss)


def lie_channels_last(model: nn.Module) -> None:
    """Let a model's 4-D parameters and buffers lie channels last, in place.

    Raises:
        ConfigError: It has no such parameter.
    """
    if not any(parameter.dim() == 4 for parameter in model.parameters()):
        raise ConfigError(
            "channels_last (--channels-last) is for the 4-D weights of convolutions, of which the model has none; leave it out"
        )
    model.to(memory_format=torch.channels_last)


@contextmanager
def _tf32() -> Iterator[None]:
    """Let GPUs multiply float32 as TF32."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches: list[tuple[Any, str, Any]] = (
        [(where, "fp32_precision", "tf32") for where in (cuda, cudnn.conv, cudnn.rnn)]
        if hasattr(cudnn, "conv")  # since torch 2.9
        else [(where, "allow_tf32", True) for where in (cuda, cudnn)]
    )
    before = [getattr(where, name) for where, name, _ in switches]
    for where, name, value in switches:
        setattr(where, name, value)
    try:
        yield
    finally:
        for (where, name, _), value in zip(switches, before, strict=True):
            setattr(where, name, value)
