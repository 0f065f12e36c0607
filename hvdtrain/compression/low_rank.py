"""A matrix as the product of two thin ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvdtrain.compression.base import Compression, Exchange, Memory, Sent, Sum
from hvdtrain.errors import ConfigError
from hvdtrain.settings.wording import shown


class PowerSGD(Compression):
    """One round of power iteration a step, which goes on where the last step's ended; the rest is sent later.

    Vogels, Karimireddy, Jaggi 2019, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
    https://arxiv.org/abs/1905.13727. A parameter of shape (n, ...) is a matrix of n rows; of m columns, rank * (n + m)
    numbers travel, in two sums one after the other. What is not smaller that way travels as it is.

    Args:
        rank: Columns of the thin matrices, 1 or more.

    Raises:
        ConfigError: It is no such number.
    """

    rounds = 2

    def __init__(self, rank: int) -> None:
        if type(rank) is not int or rank < 1:
            raise ConfigError(f"{type(self).__name__}'s rank must be a whole number from 1, got {shown(rank)}")
        self.rank = rank
        self.name = f"powersgd:{rank}"

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the thin matrices are smaller."""
        if len(shape) < 2:
            return False
        rows, columns = shape[0], math.prod(shape[1:])
        return self.rank * (rows + columns) < rows * columns

    def exchange(self, tensor: Tensor, memory: Memory, seed: int) -> Exchange:
        """Sum P = M Q, make its columns orthonormal, sum Q = M^T P: the ranks' sum is about P Q^T."""
        matrix = tensor.reshape(len(tensor), -1)
        q = memory.get("q")
        if q is None:
            q = start(matrix.shape[1], self.rank, seed)
        q = q.to(matrix.device, matrix.dtype)
        p = yield Sum(matrix @ (q / q.norm().clamp_min(torch.finfo(q.dtype).tiny)))  # its length says nothing
        p = orthonormal(p)
        mine = (p.t() @ matrix).t().contiguous()  # M^T P, of which BLAS takes 30 times as long
        q = yield Sum(mine)
        return Sent((p @ q.t()).view(tensor.shape), (p @ mine.t()).view(tensor.shape), {"q": q})


def start(columns: int, rank: int, seed: int) -> Tensor:
    """The first Q, float64, shape (columns, rank): normal numbers that follow from the seed."""
    return torch.randn(columns, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(p: Tensor) -> Tensor:
    """An orthonormal basis of a matrix's columns and, where they do not suffice, of what else; NaN stays NaN."""
    finite = torch.isfinite(p).all()
    basis = torch.linalg.qr(torch.where(finite, p, 0.0)).Q  # LAPACK refuses what is not finite
    return torch.where(finite, basis, torch.nan)
