"""From a data set and a batch sampler to batches on a device.

The loader is torch's own `DataLoader`; what is added is that random augmentation in loader processes depends on the
batch and not on which process happens to load it, and that tensors in memory are batched by one indexing operation. No
loader here draws from the global random state of the process that makes it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import random
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.data.samplers import IndexBatch
from hvdtrain.data.worker_signals import OutliveSigterm
from hvdtrain.errors import ConfigError


def make_loader(
    dataset: Dataset[Any],
    batch_sampler: Sampler[list[int]],
    *,
    workers: int = 0,
    pin_memory: bool = False,
    seed: int = 0,
    timeout_s: float = 0,
    collate: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    """Return a loader of the batches that ``batch_sampler`` names.

    With ``workers=0`` samples are loaded in this process, and a data set that draws random numbers draws them from this
    process's random state. With loader processes, each batch first seeds the random numbers of torch, NumPy and
    `random` in the process that loads it, from ``seed`` and the batch's key: the same numbers for any number of
    processes, and for a run that continues in the middle of an epoch. The
    processes outlive a SIGTERM for as long as their rank does.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        batch_sampler: Yields lists of data set indices.
        workers: Loader processes; they live as long as the loader.
        pin_memory: Load into pinned memory, for faster copies to a GPU; without effect where there is none.
        seed: Of random numbers in loader processes.
        timeout_s: Longest wait for a batch from a loader process, in seconds; 0 for no limit.
        collate: Makes a batch out of a list of samples; torch's default otherwise.

    Raises:
        ConfigError: A value that cannot work, or a data set that cannot be indexed.
    """
    if workers < 0:
        raise ConfigError(f"workers must be 0 or more, got {workers}")
    if timeout_s < 0:
        raise ConfigError(f"timeout_s must be 0 or more, got {timeout_s}")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"{type(dataset).__name__} cannot be split over ranks exactly; a data set needs __len__ and __getitem__"
        )
    whole = collate is None and _loads_whole_batches(dataset)
    source: Any = _WholeBatches(dataset) if whole else dataset
    if workers:
        source = _SeededBatches(source, seed)
    return DataLoader(
        source,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_as_it_is if whole else collate,
        pin_memory=pin_memory and torch.cuda.is_available(),
        timeout=timeout_s if workers else 0,
        generator=torch.Generator().manual_seed(seed),  # else each iterator would draw from the global one
        worker_init_fn=OutliveSigterm() if workers else None,
        persistent_workers=workers > 0,
    )


def empty_batch(dataset: Dataset[Any], collate: Callable[[list[Any]], Any] | None = None) -> Any:
    """Return a batch of length 0, of the shapes and types that a batch of this data set has."""
    one = (
        dataset.batch([0])
        if isinstance(dataset, ArrayDataset) and collate is None
        else (collate or default_collate)([dataset[0]])
    )
    return tree_map(lambda x: x[:0] if isinstance(x, torch.Tensor) and x.dim() else x, one)


def to_device(batch: Any, device: torch.device | str, non_blocking: bool = False) -> Any:
    """Return a batch with its tensors on a device; the argument itself is not changed.

    Args:
        batch: Tensors, objects with ``.to(device)``, and tuples, namedtuples, lists, mappings and dataclasses of these,
            nested as they like. Anything else is returned as it is.
        device: Where to.
        non_blocking: Return before copies from pinned memory are done.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=non_blocking)
    kind = type(batch)
    if kind is tuple or kind is list:
        return kind(to_device(value, device, non_blocking) for value in batch)
    if kind is dict:
        return {key: to_device(value, device, non_blocking) for key, value in batch.items()}
    if kind in (str, bytes, int, float, bool, type(None)) or isinstance(batch, type):
        return batch
    if callable(getattr(batch, "to", None)):
        return batch.to(device, **({"non_blocking": True} if non_blocking and _takes_non_blocking(batch.to) else {}))
    return _other_container_to_device(batch, device, non_blocking)


def _other_container_to_device(batch: Any, device: torch.device | str, non_blocking: bool) -> Any:
    """Subclasses of tuple, list and dict, other mappings, and dataclasses: a copy of the same type."""
    clone: Any = batch
    if isinstance(batch, tuple) and not isinstance(batch, torch.Size):
        moved = (to_device(value, device, non_blocking) for value in batch)
        clone = batch._make(moved) if hasattr(batch, "_make") else type(batch)(moved)
    elif isinstance(batch, list):
        clone = copy.copy(batch)
        clone[:] = [to_device(value, device, non_blocking) for value in batch]
    elif isinstance(batch, Mapping):
        content = {key: to_device(value, device, non_blocking) for key, value in batch.items()}
        if isinstance(batch, MutableMapping):
            clone = copy.copy(batch)
            clone.update(content)
        else:
            clone = type(batch)(content)  # type: ignore[call-arg]
    elif dataclasses.is_dataclass(batch):
        clone = copy.copy(batch)  # and not dataclasses.replace, which would run __post_init__ again
        for field in dataclasses.fields(batch):
            if hasattr(batch, field.name):
                object.__setattr__(clone, field.name, to_device(getattr(batch, field.name), device, non_blocking))
    return clone


def _takes_non_blocking(to: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(to).parameters
    except (TypeError, ValueError):  # a builtin that does not tell
        return False
    keywords = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return keywords or "non_blocking" in parameters


def _loads_whole_batches(dataset: Dataset[Any]) -> bool:
    """Whether an ArrayDataset's ``batch`` speaks for its ``__getitem__``: no subclass overrides the latter alone."""
    if not isinstance(dataset, ArrayDataset):
        return False
    owner = next(cls for cls in type(dataset).__mro__ if "__getitem__" in vars(cls) or "batch" in vars(cls))
    return "batch" in vars(owner)


def _as_it_is(batch: Any) -> Any:
    return batch


class _WholeBatches(Dataset[Any]):
    """An ArrayDataset whose batches need no collating. (`ArrayDataset` itself cannot be so: torch's Subset expects
    ``__getitems__`` to return single samples.)
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: list[int]) -> Any:
        return self._dataset.batch(indices)


class _SeededBatches(Dataset[Any]):
    """A data set in a loader process: seeds the process's random numbers for each batch, then loads it."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, indices: list[int]) -> Any:
        if isinstance(indices, IndexBatch):
            _seed_process(self._seed, *indices.key)
        if getattr(self._dataset, "__getitems__", None):
            return self._dataset.__getitems__(indices)
        return [self._dataset[index] for index in indices]


def _seed_process(*numbers: int) -> None:
    """Seed every usual source of random numbers in this process from a few integers.

    torch's CPU generator takes 32 bits of a seed, so they are mixed first: neighbouring batches share nothing.
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=20).digest()
    words = [int.from_bytes(digest[start : start + 4], "little") for start in range(0, 20, 4)]
    torch.default_generator.manual_seed(words[0])  # torch.manual_seed would also speak to CUDA, which a fork must not
    random.seed(digest)
    np.random.seed(words[1:])
