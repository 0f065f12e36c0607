"""Smaller numbers on the way: what `DistributedOptimizer` and `allreduce` do with tensors before and after they travel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Compressor:
    """The interface of a compressor; its methods are static."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Any]:
        """What travels, and what `decompress` needs to know."""
        raise NotImplementedError

    @staticmethod
    def decompress(tensor: Tensor, ctx: Any) -> Tensor:
        """The tensor as it was, but for what was lost."""
        raise NotImplementedError


class NoneCompressor(Compressor):
    """Nothing is changed."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Any]:
        """The tensor itself."""
        return tensor, None

    @staticmethod
    def decompress(tensor: Tensor, ctx: Any) -> Tensor:
        """The tensor itself."""
        return tensor


class FP16Compressor(Compressor):
    """Floating-point numbers travel as float16; the ranks' sum is made in float32 and rounded once."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, Any]:
        """A float16 tensor, of one of floats."""
        return (tensor.to(torch.float16) if tensor.dtype.is_floating_point else tensor), tensor.dtype

    @staticmethod
    def decompress(tensor: Tensor, ctx: Any) -> Tensor:
        """In the dtype that it had."""
        return tensor.to(ctx)


class Compression:
    """Compressors by Horovod's names."""

    none = NoneCompressor
    fp16 = FP16Compressor
