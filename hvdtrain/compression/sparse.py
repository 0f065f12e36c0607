"""Few of the numbers in each step, the others later: the largest, or some at random."""

from __future__ import annotations

import math
import random
from typing import ClassVar

import torch
from torch import Tensor

from hvdtrain.compression.base import Compression, Exchange, Gather, Memory, Sent, Sum
from hvdtrain.errors import ConfigError
from hvdtrain.settings.wording import shown

_LOW_BITS = 20


class _Part(Compression):
    """A part of a parameter's numbers.

    Args:
        ratio: The part that is sent, in (0, 1]; at least one number is.

    Raises:
        ConfigError: There is no such part.
    """

    kind: ClassVar[str]

    def __init__(self, ratio: float) -> None:
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio <= 1:
            raise ConfigError(
                f"{type(self).__name__}'s ratio must be the part that is sent, more than 0 and at most 1, got {shown(ratio)}"
            )
        self.ratio = ratio
        short = f"{ratio:g}"
        self.name = f"{self.kind}:{short if float(short) == ratio else repr(ratio)}"

    def _count(self, numel: int) -> int:
        return min(numel, max(1, math.ceil(self.ratio * numel)))


class TopK(_Part):
    """The numbers of the largest magnitude of each rank, and where they stand: 8 bytes each, sent to every rank.

    Lin et al. 2017, "Deep Gradient Compression", https://arxiv.org/abs/1712.01887, without its corrections of momentum.

    Args:
        ratio: The part of a parameter's numbers that is sent, in (0, 1]; at least one is.
    """

    kind = "topk"

    def exchange(self, tensor: Tensor, memory: Memory, seed: int) -> Exchange:
        """Collect every rank's largest numbers, and add them up where they belong."""
        flat = tensor.reshape(-1)
        where = flat.abs().topk(self._count(len(flat)), sorted=False).indices
        values = flat[where]
        all_where, all_values = yield (
            Gather(where.to(torch.int32 if len(flat) < 2**31 else torch.int64)),
            Gather(values),
        )
        total = torch.zeros_like(flat)
        for each_where, each_values in zip(all_where, all_values, strict=True):
            total[each_where.long()] += each_values  # a rank's places differ from each other
        own = torch.zeros_like(flat)
        own[where] = values
        return Sent(total.view(tensor.shape), own.view(tensor.shape))


class RandomK(_Part):
    """Numbers at random places, other ones in each step and the same on every rank, so that values alone travel and are summed.

    The places are an arithmetic sequence modulo the number of numbers, with a random start and a random step: every number is
    as likely to be among them.

    Args:
        ratio: The part of a parameter's numbers that is sent, in (0, 1]; at least one is.
    """

    kind = "randomk"

    def exchange(self, tensor: Tensor, memory: Memory, seed: int) -> Exchange:
        """Sum the numbers at this step's places."""
        flat = tensor.reshape(-1)
        count = int(memory["count"]) if "count" in memory else 0
        where = places(len(flat), self._count(len(flat)), f"{seed}:{count}").to(flat.device)
        values = flat[where]
        own, total = torch.zeros_like(flat), torch.zeros_like(flat)
        own[where] = values
        total[where] = yield Sum(values)
        return Sent(total.view(tensor.shape), own.view(tensor.shape), {"count": torch.tensor(count + 1)})


def places(numel: int, count: int, seed: str) -> Tensor:
    """Different places among ``numel``, int64, shape (count,); they follow from the seed."""
    numbers = random.Random(seed)
    start, step = numbers.randrange(numel), numbers.randrange(1, numel + 1)
    while math.gcd(step, numel) != 1:
        step = numbers.randrange(1, numel + 1)
    return terms(torch.arange(count), numel, start, step)


def terms(which: Tensor, numel: int, start: int, step: int) -> Tensor:
    """The terms of an arithmetic sequence modulo ``numel``, exactly, for numbers up to 2**40.

    ``which * step`` would not fit into an int64 from some 3e9 on, so it is made of two products, each of them small.

    Args:
        which: Which terms, int64, from 0 and less than ``numel``.
        numel: From 1.
        start: Term 0, less than ``numel``.
        step: From one term to the next, at most ``numel``.
    """
    high, low = which >> _LOW_BITS, which & (2**_LOW_BITS - 1)
    wide = (step << _LOW_BITS) % numel  # Python's own integers have no bounds
    found: Tensor = (high * wide % numel + low * (step % numel) + start) % numel
    return found
