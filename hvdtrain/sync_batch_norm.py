"""Batch normalisation over the whole global batch, on every backend and device.

torch's own `SyncBatchNorm` needs GPUs and a process group; this one needs a running backend. Mean and variance of a
layer are those of the samples of all ranks (of one micro-batch), so that the running statistics and the gradients equal
those of a single process with the whole batch. Every rank must make the same forward passes, if need be with an empty
batch, as `Trainer` and `Backend.loader` see to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from hvdtrain.backends.communicator import Communicator
from hvdtrain.errors import ConfigError, TrainingError


def convert_sync_batch_norm(model: nn.Module, backend: Communicator) -> nn.Module:
    """Replace every batch normalisation of a model by `SyncBatchNorm`.

    Parameters and buffers are kept as they are, so that an optimizer over them stays valid.

    Args:
        model: Changed in place, unless it is a batch normalisation itself.
        backend: A running backend, or one of its groups.

    Returns:
        The model.

    Raises:
        ConfigError: A lazy layer, whose size is not known yet.
    """
    if isinstance(model, _BatchNorm) and not isinstance(model, SyncBatchNorm):
        return SyncBatchNorm.of(model, backend)
    for name, child in model.named_children():
        converted = convert_sync_batch_norm(child, backend)
        if converted is not child:
            setattr(model, name, converted)
    return model


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation (Ioffe and Szegedy 2015) with the statistics of all ranks.

    Input and output have shape (N, C, ...), N may be 0 on some ranks. In evaluation it is like any other batch
    normalisation and communicates nothing.
    """

    link: Link

    @classmethod
    def of(cls, layer: _BatchNorm, communicator: Communicator) -> SyncBatchNorm:
        """Take over a layer's parameters, buffers, settings and mode."""
        if isinstance(layer, LazyModuleMixin):
            raise ConfigError(
                f"{type(layer).__name__} does not know its size yet; run the model once before you convert it"
            )
        made = cls(layer.num_features, layer.eps, layer.momentum, affine=False, track_running_stats=False)
        made.affine, made.track_running_stats = layer.affine, layer.track_running_stats
        for name in ("weight", "bias"):
            made.register_parameter(name, getattr(layer, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            made.register_buffer(name, getattr(layer, name))
        made.training = layer.training
        made.link = Link(communicator)
        _leave_uncompiled()
        return made

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.size(1) != self.num_features:
            raise ValueError(f"expected an input of shape (N, {self.num_features}, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel over all ranks' samples and positions."""
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        communicator = self.link.communicator
        if communicator is None:
            raise TrainingError(
                "this SyncBatchNorm was unpickled, and is joined to no ranks; call hvdtrain.convert_sync_batch_norm(model, backend) on "
                "a model with ordinary batch normalisation and load its state_dict"
            )
        output: Tensor
        output, mean, variance, count = _normalise(input, self.weight, self.bias, self.eps, communicator)
        if self.training and self.running_mean is not None:
            self._track(mean, variance, count)
        return output

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        unbiased = variance * (count / (count - 1))
        self.running_mean.mul_(1 - factor).add_(mean.to(self.running_mean.dtype), alpha=factor)
        self.running_var.mul_(1 - factor).add_(unbiased.to(self.running_var.dtype), alpha=factor)


class Link:
    """A module's way to the other ranks: copies of the module share it, pickles leave it behind."""

    def __init__(self, communicator: Communicator | None = None) -> None:
        self.communicator = communicator

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return self

    def __reduce__(self) -> tuple[Callable[[], Link], tuple[()]]:
        return Link, ()


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, communicator: Communicator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        axes = [axis for axis in range(x.dim()) if axis != 1]
        values = x.detach().to(exact)
        channels = x.size(1)
        count = x.numel() // max(1, channels)
        # Each rank tells count, mean and squared deviation from its own mean (Chan, Golub and LeVeque 1979): the sum of
        # squares that would need one number less loses the variance of data with a large mean. One exchange in all.
        stats = torch.zeros(communicator.wire.size, 2 * channels + 1, dtype=torch.float64, device=x.device)
        if count:
            mean = values.mean(axes)
            deviation = (values - _wide(mean, x)).square().sum(axes)
            stats[communicator.wire.rank] = torch.cat(
                [mean.double(), deviation.double(), mean.new_tensor([count]).double()]
            )
        stats = communicator.all_reduce(stats)
        counts, means, deviations = stats[:, -1:], stats[:, :channels], stats[:, channels:-1]
        total = counts.sum()
        if count <= 1 and float(total) <= 1:  # looked at only where it can be: reading a number from a GPU waits for it
            raise ValueError(
                f"batch normalisation in training needs more than one value per channel over all ranks, got {total:g}"
            )
        mean = (counts * means).sum(0) / total
        variance = (deviations + counts * (means - mean).square()).sum(0) / total
        scale = torch.rsqrt(variance + eps)
        normal = (values - _wide(mean.to(exact), x)) * _wide(scale.to(exact), x)
        ctx.save_for_backward(normal, scale.to(exact), weight)
        ctx.total, ctx.axes, ctx.communicator, ctx.has_bias = total.to(exact), axes, communicator, bias is not None
        y = normal
        if weight is not None:
            y = y * _wide(weight.to(exact), x)
        if bias is not None:
            y = y + _wide(bias.to(exact), x)
        ctx.mark_non_differentiable(mean, variance, total)
        return y.to(x.dtype), mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        normal, scale, weight = ctx.saved_tensors
        dy = grads[0].to(normal.dtype)
        of_bias = dy.sum(ctx.axes)
        of_weight = (dy * normal).sum(ctx.axes)
        sums = ctx.communicator.all_reduce(torch.stack([of_bias, of_weight])) / ctx.total
        dx = dy - _wide(sums[0], dy) - normal * _wide(sums[1], dy)
        factor = scale if weight is None else scale * weight.to(scale.dtype)
        dx = (dx * _wide(factor, dy)).to(grads[0].dtype)
        return (
            dx,
            None if weight is None else of_weight.to(weight.dtype),
            of_bias.to(grads[0].dtype if weight is None else weight.dtype) if ctx.has_bias else None,
            None,
            None,
        )


_normalise: Callable[..., Any] = _Normalise.apply


@functools.cache
def _leave_uncompiled() -> None:
    """Let compilers break their graph at each of these layers, because they cannot look into what ranks exchange.

    Not done before there is one: it loads torch's compiler, which takes seconds (and which every optimizer loads too).
    """
    global _normalise  # noqa: PLW0603 - a compiler recognises the function itself
    _normalise = torch.compiler.disable(_Normalise.apply)


def _wide(per_channel: Tensor, like: Tensor) -> Tensor:
    return per_channel.view(1, -1, *[1] * (like.dim() - 2))
