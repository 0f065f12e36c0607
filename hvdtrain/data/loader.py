"""From a data set and a batch sampler to batches.

The loader is torch's own `DataLoader`; what is added is that random augmentation in loader processes depends on the
batch and not on which process happens to load it, and that tensors in memory are batched by one indexing operation. No
loader here draws from the global random state of the process that makes it.
"""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.data.nested import LONGER, SHORTER, empty_from
from hvdtrain.data.random_numbers import seed_process, untouched_random_numbers
from hvdtrain.data.samplers import IndexBatch
from hvdtrain.data.worker_end import EndWithRank, note
from hvdtrain.data.worker_signals import OutliveSigterm
from hvdtrain.errors import ConfigError


def make_loader(
    dataset: Dataset[Any],
    batch_sampler: Sampler[list[int]] | Sequence[list[int]],
    *,
    workers: int = 0,
    pin_memory: bool = False,
    seed: int = 0,
    timeout_s: float = 0,
    collate: Callable[[list[Any]], Any] | None = None,
    persistent_workers: bool = True,
    worker_init: Callable[[int], None] | None = None,
    prefetch_factor: int | None = None,
    multiprocessing_context: Any = None,
) -> DataLoader[Any]:
    """Return a loader of the batches that ``batch_sampler`` names.

    With ``workers=0`` samples are loaded in this process, and a data set that draws random numbers draws them from this
    process's random state. With loader processes, each batch first seeds the random numbers of torch, NumPy and
    `random` in the process that loads it, from ``seed`` and the batch's key: the same numbers for any number of
    processes, and for a run that continues in the middle of an epoch. The
    processes outlive a SIGTERM for as long as their rank does, and end with it.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        batch_sampler: Yields lists of data set indices.
        workers: Loader processes.
        pin_memory: Load into pinned memory, for faster copies to a GPU; without effect where there is none.
        seed: Of random numbers in loader processes.
        timeout_s: Longest wait for a batch from a loader process, in seconds; 0 for no limit.
        collate: Makes a batch out of a list of samples; torch's default otherwise.
        persistent_workers: Loader processes live as long as the loader; else as long as an epoch.
        worker_init: Called in each loader process with its number before it loads anything.
        prefetch_factor: Batches loaded in advance by each loader process; 2 otherwise.
        multiprocessing_context: How loader processes begin, see `torch.utils.data.DataLoader`.

    Raises:
        ConfigError: A value that cannot work, or a data set that cannot be indexed.
    """
    if workers < 0:
        raise ConfigError(f"workers must be 0 or more, got {workers}")
    if timeout_s < 0:
        raise ConfigError(f"timeout_s must be 0 or more, got {timeout_s}")
    check_indexable(dataset)
    whole = collate is None and _loads_whole_batches(dataset)
    source: Any = _WholeBatches(dataset) if whole else dataset
    if workers:
        source = _SeededBatches(source, seed)
    return _Loader(
        source,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_as_it_is if whole else collate,
        pin_memory=pin_memory and torch.cuda.is_available(),
        timeout=timeout_s if workers else 0,
        generator=torch.Generator().manual_seed(seed),  # else each iterator would draw from the global one
        worker_init_fn=_WorkerStart(worker_init, _start_method(multiprocessing_context)) if workers else None,
        persistent_workers=workers > 0 and persistent_workers,
        prefetch_factor=prefetch_factor if workers else None,
        multiprocessing_context=multiprocessing_context if workers else None,
    )


def check_indexable(dataset: Any) -> None:
    """Refuse what has no samples to point at.

    Raises:
        ConfigError: Says how to train on it all the same.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"{type(dataset).__name__} cannot be split over ranks exactly: a data set needs __len__ and __getitem__. A stream "
            "needs a loop of your own: let each rank read its own part of it, and for each batch call "
            "replica.backward(loss, samples=len(batch)) and replica.step(); a rank whose part has ended calls replica.step() "
            "alone until all have"
        )


@contextmanager
def length_explained(dataset: Any) -> Iterator[None]:
    """Surround the reading of samples.

    Raises:
        ConfigError: There is no such sample, though the data set's length says so.
    """
    try:
        yield
    except IndexError as error:
        said = str(error).strip().rpartition("\n")[2] or "IndexError"
        raise ConfigError(
            f"reading samples of the data set, a {type(dataset).__name__}, ended in an IndexError ({said}), and its length says "
            f"{len(dataset)} samples. If it has fewer, let its __len__ return how many can be read, or give "
            "torch.utils.data.Subset(data, range(N)); a sampler of your own must give indices that there are"
        ) from error


def look_at_samples(
    dataset: Dataset[Any], indices: Sequence[Any], look: Callable[[Any], Any], *, workers: int = 0, **processes: Any
) -> list[Any]:
    """Load single samples, as training loads them, and return what ``look`` says of each.

    Each is loaded under the same random numbers, on every rank and at every call; those of this process are as before.
    Where training has loader processes, the data set itself is not read here: what it opens when it is first read would
    be handed down to all of them. A loader process reads it; or, where such a process begins with a copy and slowly
    ("spawn", "forkserver"), a copy.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        indices: Which samples.
        look: Gets what a collate function would get for a batch of one: a list with the sample, mostly.
        workers: Loader processes of the training.
        processes: Their further arguments for `make_loader`.
    """
    batches = [IndexBatch([index], (2,)) for index in indices]  # the key of none that is trained on or evaluated
    if workers and _start_method(processes.get("multiprocessing_context")) == "fork":
        loader = make_loader(dataset, batches, workers=1, collate=look, persistent_workers=False, **processes)
        return list(loader)
    if workers:
        dataset = pickle.loads(pickle.dumps(dataset))
    seeded = _SeededBatches(dataset, 0)
    with untouched_random_numbers():
        return [look(seeded.__getitems__(batch)) for batch in batches]


def empty_batch(dataset: Dataset[Any], **how: Any) -> Any:
    """Return a batch of length 0, of the shapes and types that a batch of this data set has.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        how: As for `two_batches`.

    Raises:
        ConfigError: The batches do not show what an empty one would be.
    """
    return empty_from(*two_batches(dataset, **how))


def two_batches(
    dataset: Dataset[Any],
    *,
    collate: Callable[[list[Any]], Any] | None = None,
    index: Any = 0,
    workers: int = 0,
    **processes: Any,
) -> tuple[Any, Any]:
    """Return two batches that differ in nothing but their length: `SHORTER` and `LONGER` times the same sample.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        collate: As for `make_loader`.
        index: Of the sample.
        workers: As for `look_at_samples`.
        processes: As for `look_at_samples`.
    """
    if collate is None and _loads_whole_batches(dataset):
        whole: Any = dataset
        return whole.batch([index] * SHORTER), whole.batch([index] * LONGER)
    look = _TwoBatches(collate or default_collate)
    pair: tuple[Any, Any] | None
    (pair,) = look_at_samples(dataset, [index], look, workers=workers, **processes)
    if pair is None:
        batches = [IndexBatch([index] * length, (2,)) for length in (SHORTER, LONGER)]
        with untouched_random_numbers():
            shorter, longer = make_loader(dataset, batches, workers=min(workers, 1), collate=collate, **processes)
        pair = shorter, longer
    return pair


def _loads_whole_batches(dataset: Dataset[Any]) -> bool:
    """Whether an ArrayDataset's ``batch`` speaks for its ``__getitem__``: no subclass overrides the latter alone."""
    if not isinstance(dataset, ArrayDataset):
        return False
    owner = next(cls for cls in type(dataset).__mro__ if "__getitem__" in vars(cls) or "batch" in vars(cls))
    return "batch" in vars(owner)


def _as_it_is(batch: Any) -> Any:
    return batch


class _TwoBatches:
    """Collates one sample into two batches that differ in nothing but their length; None for what is no list."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Any) -> tuple[Any, Any] | None:
        if not isinstance(samples, list):  # a data set whose __getitems__ makes batches
            return None
        return self._batch(samples, SHORTER), self._batch(samples, LONGER)

    def _batch(self, samples: list[Any], length: int) -> Any:
        seed_process()  # a collate function may draw, and must draw the same for both
        return self._collate([_copied(samples[0]) for _ in range(length)])


def _start_method(context: Any) -> str:
    if isinstance(context, str):
        return context
    return str((context or multiprocessing).get_start_method())


def _copied(sample: Any) -> Any:
    try:
        return copy.deepcopy(sample)  # a collate function may take its samples apart
    except Exception:  # deepcopy may ask anything of it
        return sample


class _Loader(DataLoader[Any]):
    """torch's, whose processes end with this one."""

    def __iter__(self) -> Any:
        if not self.num_workers:
            return super().__iter__()
        before = multiprocessing.active_children()
        batches = super().__iter__()
        note(before)
        return batches


class _WorkerStart:
    """What a loader process does first."""

    def __init__(self, users: Callable[[int], None] | None, start_method: str) -> None:
        self._outlive, self._end, self._users = OutliveSigterm(), EndWithRank(start_method), users

    def __call__(self, worker: int) -> None:
        self._end(worker)
        self._outlive(worker)
        if self._users is not None:
            self._users(worker)


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
            seed_process(self._seed, *indices.key)
        if getattr(self._dataset, "__getitems__", None):
            return self._dataset.__getitems__(indices)
        return [self._dataset[index] for index in indices]
