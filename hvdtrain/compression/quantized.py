"""Fewer bits a number: 8 as integers or floats, or the sign alone, each with a scale for every block of numbers.

Every rank sends its numbers to all others, so that what a rank receives grows with the number of ranks.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from hvdtrain.compression.base import Compression, Exchange, Gather, Memory, Sent

_BLOCK = 256  # numbers that share a scale
_BITS = (1, 2, 4, 8, 16, 32, 64, 128)


class _Quantized(Compression):
    """Codes of one byte or less, and a float32 scale a block."""

    keeps_rest = False
    """What was rounded away is added to the next gradient."""

    def exchange(self, tensor: Tensor, memory: Memory, seed: int) -> Exchange:
        """Collect every rank's codes and scales, and sum what they mean."""
        blocks = _in_blocks(tensor)
        codes, scales = self.encode(blocks, tensor.numel())
        all_codes, all_scales = yield Gather(codes), Gather(scales)
        total = torch.zeros_like(blocks)
        for each_codes, each_scales in zip(all_codes, all_scales, strict=True):  # in one order, so that all ranks agree
            total += self.decode(each_codes, each_scales).to(total.dtype)
        own = _out_of(self.decode(codes, scales).to(total.dtype), tensor) if self.keeps_rest else None
        return Sent(_out_of(total, tensor), own)

    @abstractmethod
    def encode(self, blocks: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Codes, and float32 scales of shape (blocks, 1).

        Args:
            blocks: Shape (blocks, numbers a block).
            numel: How many numbers that is; what follows them in the last block are zeros.
        """

    @abstractmethod
    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """What codes and scales mean, in blocks."""


class Int8(_Quantized):
    """Integers from -127 to 127, rounded to the nearest; a block's largest number is 127. 8.1 bits a number."""

    name = "int8"

    def encode(self, blocks: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Round to multiples of a block's largest number / 127."""
        scales = (blocks.abs().amax(1, keepdim=True) / 127).float()
        return _divided(blocks, scales).round_().clamp_(-127, 127).to(torch.int8), scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Multiply."""
        return codes.float() * scales


class Float8(_Quantized):
    """Floats of 8 bits, 3 of them digits (e4m3fn); a block's largest number is 448. 8.1 bits a number."""

    name = "fp8"

    def encode(self, blocks: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Round to the nearest float of 8 bits after scaling a block's largest number to 448."""
        scales = (blocks.abs().amax(1, keepdim=True) / 448).float()
        codes = _divided(blocks, scales).clamp_(-448, 448).float().to(torch.float8_e4m3fn)
        return codes.view(torch.uint8), scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Multiply."""
        return codes.view(torch.float8_e4m3fn).float() * scales


class OneBit(_Quantized):
    """The sign, times a block's mean magnitude; the rest is sent later. 1.1 bits a number.

    Seide et al. 2014, "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of Speech
    DNNs"; with one scale for both signs, as in Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847.
    """

    name = "1bit"
    keeps_rest = True

    def encode(self, blocks: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Eight signs a byte, the first in the lowest bit."""
        signs = (blocks >= 0).view(len(blocks), -1, 8)
        weights = torch.tensor(_BITS, dtype=torch.uint8, device=blocks.device)
        scales = blocks.abs().mean(1, keepdim=True).float()
        scales[-1] *= _BLOCK / (numel - _BLOCK * (len(blocks) - 1))
        return (signs * weights).sum(2, dtype=torch.uint8), scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Plus or minus the scale."""
        signs = torch.tensor(
            [[1.0 if code & bit else -1.0 for bit in _BITS] for code in range(256)], device=codes.device
        )
        return signs[codes.int()].view(len(codes), -1).mul_(scales)


def _divided(blocks: Tensor, scales: Tensor) -> Tensor:
    """Numbers over their block's scale; zeros where that is 0, as of numbers too small for float32."""
    return torch.where(scales > 0, blocks / scales.to(blocks.dtype), 0.0)


def _in_blocks(tensor: Tensor) -> Tensor:
    """Rows of `_BLOCK` numbers, the last one filled up with zeros."""
    flat = tensor.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)


def _out_of(blocks: Tensor, tensor: Tensor) -> Tensor:
    return blocks.reshape(-1)[: tensor.numel()].view(tensor.shape)
