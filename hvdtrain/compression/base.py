"""What a compression is: how the gradient of one parameter travels, written for one parameter and no engine.

A compression of your own is a class with one method, a generator: it yields what is to be summed or collected over the ranks,
gets the result, and returns the sum over the ranks as far as it arrived. Everything else is done around it, for every engine
alike: many parameters share a message, losses' weights and scales are taken out of the numbers, and what was not sent is added
to the next step's gradient::

    class EverySecond(Compression):
        name = "every-second"

        def exchange(self, tensor, memory, seed):
            sent = torch.zeros_like(tensor)
            half = int(memory["half"]) if memory else 0
            sent.view(-1)[half::2] = tensor.view(-1)[half::2]
            total = torch.zeros_like(tensor)
            total.view(-1)[half::2] = yield Sum(sent.view(-1)[half::2].contiguous())
            return Sent(total, sent, {"half": torch.tensor(1 - half)})

The classes here are values: what they remember between steps is handed to them and back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Memory = Mapping[str, Tensor]
"""What a compression remembers of one parameter between steps, by name: the same on every rank."""


@dataclass(frozen=True, slots=True)
class Sum:
    """Sum a float32 or float64 tensor over the ranks; the result has its shape, which is the same on every rank."""

    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Gather:
    """Collect a tensor of any type; the result has shape (ranks, \\*shape). The shape is the same on every rank."""

    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Sent:
    """What came of an exchange.

    Attributes:
        total: The ranks' sum as far as it arrived, of the tensor's shape; the same numbers on every rank.
        own: This rank's part of the total: over the ranks these add up to it. The rest of the tensor is added to the
            next step's gradient. None to let go of the rest.
        memory: For the next step.
    """

    total: Tensor
    own: Tensor | None = None
    memory: Memory = field(default_factory=dict)


Exchange = Generator[Sum | Gather | tuple[Sum | Gather, ...], Any, Sent]


class Compression(ABC):
    """How gradients travel, one parameter at a time.

    Attributes:
        name: As checkpoints and messages call it, its numbers included. What another one has remembered is not used.
        rounds: How often `exchange` yields. Where messages travel beside steps that are taken meanwhile, so many begin one after
            the other; what is asked for beyond that is waited for at the end.
    """

    name: str
    rounds: int = 1

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether the gradient of a parameter of this shape is compressed; others travel as they are.

        Norms and biases, which have one dimension, are small and sensitive, and are left alone.
        """
        return len(shape) >= 2

    @abstractmethod
    def exchange(self, tensor: Tensor, memory: Memory, seed: int) -> Exchange:
        """Send this rank's part of a gradient.

        Args:
            tensor: float32 or float64, contiguous, of the parameter's shape: what is to be summed over the ranks. Left alone.
            memory: What the last exchange of this parameter returned; empty in the first step. Left alone.
            seed: The parameter's own, the same on every rank and in every run.

        Yields:
            `Sum` and `Gather`, each for its result, or a tuple of them, which travel at once, for a tuple of results. Their
            number, kinds, types and shapes are the same on every rank, whatever the numbers are.

        Returns:
            What arrived.
        """
