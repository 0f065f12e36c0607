"""A data set held in tensors, from which a whole batch is one indexing operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hvdtrain.errors import ConfigError


class ArrayDataset(Dataset[tuple[Tensor, ...]]):
    """Samples along the first dimension of one or more tensors, as `torch.utils.data.TensorDataset`, but faster.

    `hvdtrain.data.loader.make_loader` takes its batches from `batch`, without collating single samples. A subclass
    that overrides ``__getitem__`` but not ``batch`` is loaded sample by sample like any other data set.

    Args:
        tensors: Of equal length along their first dimension.

    Raises:
        ConfigError: There is no tensor, or they differ in length.
    """

    def __init__(self, *tensors: Tensor) -> None:
        lengths = [len(tensor) if tensor.dim() else None for tensor in tensors]
        if not tensors or lengths[0] is None or len(set(lengths)) > 1:
            raise ConfigError(
                "an ArrayDataset needs tensors of equal length along their first dimension, got shapes "
                f"{[tuple(tensor.shape) for tensor in tensors]}"
            )
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the samples of the given indices as one tensor each, which share no memory with the data set."""
        chosen = torch.tensor(indices)
        return tuple(tensor.index_select(0, chosen) for tensor in self.tensors)
