"""How many samples a batch has, where that can be seen: at the places where a batch of three has one more than a batch of two.

One batch does not show it: a list of two may be two fields or two samples, and the first dimension may be time, or tokens of
all samples together. Two batches of different length do, for whatever a collate function makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from hvdtrain.data.nested import LONGER, SHORTER, parts_of, step_into

_Way = tuple[Any, ...]  # keys that lead to a part of a batch


class SampleCount:
    """Counts the samples of the batches of one data set.

    Args:
        shorter: A batch of `hvdtrain.data.nested.SHORTER` samples.
        longer: One of `LONGER`, otherwise alike.

    Attributes:
        place: Where it looks, for messages; "" if nothing shows the samples.
    """

    def __init__(self, shorter: Any, longer: Any) -> None:
        self._places = list(_growing(shorter, longer, (), ()))
        self.place = ""
        if self._places:
            way, dim = self._places[0]
            node, self.place = shorter, "batch"
            for key in way:
                self.place, node = step_into(self.place, node, key), _part(node, key)
            self.place += ", its length" if dim is None else f", dimension {dim}"

    def __call__(self, batch: Any) -> int | None:
        """Return how many samples a batch has; None where no place shows it, or the places disagree."""
        sizes = {_size(batch, way, dim) for way, dim in self._places}
        return sizes.pop() if len(sizes) == 1 else None


def _growing(a: Any, b: Any, way: _Way, above: tuple[int, ...]) -> Iterator[tuple[_Way, int | None]]:
    """Where two batches differ as their numbers of samples do: a way, and a dimension or None for a length."""
    if type(a) is not type(b) or id(a) in above:
        return
    if isinstance(a, Tensor | np.ndarray | PackedSequence):
        sizes = _sizes(a), _sizes(b)
        if len(sizes[0]) == len(sizes[1]):
            yield from ((way, dim) for dim, pair in enumerate(zip(*sizes, strict=True)) if pair == (SHORTER, LONGER))
        return
    parts, longer = parts_of(a), parts_of(b)
    if parts is None or longer is None:
        return
    if (len(parts), len(longer)) == (SHORTER, LONGER) and list(parts) == list(range(SHORTER)):
        yield way, None
    elif list(parts) == list(longer):
        for key, part in parts.items():
            yield from _growing(part, longer[key], (*way, key), (*above, id(a)))


def _size(batch: Any, way: _Way, dim: int | None) -> int | None:
    try:
        for key in way:
            batch = _part(batch, key)
        return len(batch) if dim is None else _sizes(batch)[dim]
    except (AttributeError, IndexError, KeyError, TypeError):  # this batch is made in another way
        return None


def _sizes(leaf: Tensor | np.ndarray[Any, Any] | PackedSequence) -> tuple[int, ...]:
    if isinstance(leaf, PackedSequence):
        return (int(leaf.batch_sizes[0]),)
    if isinstance(leaf, Tensor) and leaf.is_nested:
        return (leaf.size(0),)  # the others may differ between samples
    return tuple(leaf.shape)


def _part(node: Any, key: Any) -> Any:
    return (parts_of(node) or {})[key]
