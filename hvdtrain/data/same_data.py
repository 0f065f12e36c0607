"""Whether every rank was given the same data, found out from a few samples.

The order of an epoch is cut over the ranks as if they held one data set; a rank that holds only its own part would train
on the wrong samples, without a word or with an engine's error. Three samples are loaded on each rank, under the same
random numbers everywhere, so that augmentation from torch's, NumPy's or `random`'s generators comes out alike. Only if
they differ is looked at more closely: a data set with random numbers of its own gives another sample each time, and of
such only the length is compared. Floating-point numbers may differ a little, as decoders on different machines do.

Where each rank keeps a part of its own for the whole run, none of the others' is read: then too only the length is compared, and
of a `Subset` its indices; but what lies in memory is compared as ever.
In any case all ranks hear of samples that some rank was promised by the length and cannot read.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.data.loader import length_explained, look_at_samples
from hvdtrain.data.nested import leaves
from hvdtrain.data.reach import Ranks, agreed_order, shard_for
from hvdtrain.data.source import Source
from hvdtrain.errors import ConfigError

_CLOSE = 3e-3  # of the mean absolute value; decoders and vector units differ by less, samples by more
_VALUES = 64  # of each tensor
_TRIES = 16  # rare augmentation must not look like a fixed sample


@dataclass(frozen=True, slots=True)
class Seen:
    """What is remembered of one leaf of a sample.

    Attributes:
        path: Where it is.
        kind: Type and dtype.
        exact: Shape, text, or a digest of whole numbers: equal or not.
        values: Some floating-point numbers: about equal or not.
    """

    path: str
    kind: str
    exact: str
    values: tuple[float, ...] = ()


_Sample = tuple[Seen, ...]


def check_same_data(source: Source, ranks: Ranks, *, seed: int = 0, name: str = "train_data") -> None:
    """Compare length and a few samples over the ranks; every rank must call it.

    Args:
        source: What this rank was given.
        ranks: All of them.
        seed: Of the sampler's order.
        name: How messages call the data.

    Raises:
        ConfigError: On every rank; says which ranks differ from rank 0, in what, and the two ways out.
    """
    if ranks.topology.world_size == 1:
        return
    length = source.length
    lengths = ranks.all_gather_object(length)
    differing = [] if source.partition == "sample-own" else _unlike_first(lengths)
    if differing:
        raise _refusal(
            name, differing, f"{lengths[0]} samples on rank 0 and {lengths[differing[0]]} on rank {differing[0]}"
        )
    if not any(lengths):
        return
    shard = shard_for(source, ranks)
    kept_apart = shard is not None and (shard.sizes is not None or not _in_memory(source.dataset))
    order: Sequence[Any] = shard.kept if shard is not None and kept_apart else range(length)
    if source.sampler is not None:
        order = agreed_order(source, ranks, 0, seed)
    indices = [order[position] for position in sorted({0, len(order) // 2, len(order) - 1}) if order]
    mine, problem = _look_or_say(source, ranks, indices)
    chosen = _chosen(source.dataset) if shard is not None and kept_apart and shard.sizes is None else ""
    everyone, problems, choices = zip(*ranks.all_gather_object((mine, problem, chosen)), strict=True)
    for rank, said in enumerate(problems):
        if said:
            raise ConfigError(f"{name}, on rank {rank}: {said}")
    if kept_apart:
        differing = _unlike_first(choices)
        if differing:
            raise _refusal(name, differing, "a Subset with other indices")
        return
    found = [_difference(everyone[0], theirs) for theirs in everyone]
    differing = [rank for rank, difference in enumerate(found) if difference]
    if differing:
        steady = not _difference(mine * _TRIES, _look(source, ranks, indices * _TRIES))
        if all(ranks.all_gather_object(steady)):
            position, what = found[differing[0]]  # type: ignore[misc]
            raise _refusal(name, differing, f"sample {indices[position]!r} is not the same ({what})")


def describe(fetched: Any) -> _Sample:
    """Return what is remembered of a sample; of a list with one sample, as a collate function gets it."""
    return tuple(
        Seen(path, *_describe_leaf(leaf))
        for path, leaf in leaves(fetched[0] if isinstance(fetched, list) else fetched, "sample")
    )


def _in_memory(dataset: Any) -> bool:
    """Whether any sample can be read without opening anything."""
    if type(dataset) is Subset:
        return _in_memory(dataset.dataset)
    return type(dataset) in (TensorDataset, ArrayDataset, list, tuple)


def _chosen(dataset: Any) -> str:
    """What a Subset chooses, in short."""
    if type(dataset) is not Subset:
        return ""
    indices = np.asarray(dataset.indices, dtype=np.int64)
    return hashlib.blake2b(indices.tobytes(), digest_size=16).hexdigest() + _chosen(dataset.dataset)


def _look_or_say(source: Source, ranks: Ranks, indices: Sequence[Any]) -> tuple[list[_Sample], str]:
    """Some samples; or why there are none, though the length says so."""
    try:
        with length_explained(source.dataset):
            return _look(source, ranks, indices), ""
    except ConfigError as error:
        if not isinstance(error.__cause__, IndexError):
            raise
        return [], str(error)


def _look(source: Source, ranks: Ranks, indices: Sequence[Any]) -> list[_Sample]:
    return look_at_samples(
        source.dataset,
        indices,
        describe,
        workers=source.workers,
        timeout_s=ranks.timeout_s if source.timeout_s is None else source.timeout_s,
        worker_init=source.worker_init,
        multiprocessing_context=source.multiprocessing_context,
    )


def _describe_leaf(leaf: Any) -> tuple[str, str, tuple[float, ...]]:
    if isinstance(leaf, Tensor):
        return _describe_tensor(leaf)
    kind = type(leaf).__name__
    if isinstance(leaf, np.ndarray | np.generic) or hasattr(leaf, "__array_interface__"):  # PIL's images too
        return _describe_array(kind, np.asarray(leaf))
    if isinstance(leaf, str):  # of a path the name alone: hosts mount folders elsewhere
        return kind, repr(os.path.basename(leaf))[:80], ()
    if isinstance(leaf, int | bytes) or leaf is None:
        return kind, repr(leaf)[:80], ()
    return kind, "", (leaf,) if isinstance(leaf, float) else ()


def _describe_tensor(tensor: Tensor) -> tuple[str, str, tuple[float, ...]]:
    kind = f"{type(tensor).__name__} of {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.is_nested or tensor.is_quantized:
        return kind, "", ()
    values = tensor.detach()
    if values.layout != torch.strided:
        values = values.to_sparse_coo().coalesce().values()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    values = values.reshape(-1)
    values = values[_evenly(values.numel())].cpu().double()
    inexact = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.uint8  # uint8: pixels
    return _numbers(kind, tuple(tensor.shape), values.numpy(), not inexact)


def _describe_array(kind: str, array: np.ndarray[Any, Any]) -> tuple[str, str, tuple[float, ...]]:
    kind = f"{kind} of {array.dtype}"
    values = array.reshape(-1)
    values = values[_evenly(values.size)]
    if array.dtype.kind == "c":
        values = np.concatenate([values.real, values.imag])
    elif array.dtype.kind not in "biuf":
        return kind, str(array.shape), ()
    return _numbers(kind, array.shape, values.astype(float), array.dtype.kind in "biu" and array.dtype != np.uint8)


def _numbers(
    kind: str, shape: tuple[int, ...], values: np.ndarray[Any, Any], exact: bool
) -> tuple[str, str, tuple[float, ...]]:
    if exact:
        return kind, f"{shape} {hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()}", ()
    return kind, str(shape), tuple(values.tolist())


def _evenly(count: int) -> list[int]:
    """Positions of up to `_VALUES` values, the first and the last among them."""
    return list(range(count)) if count <= _VALUES else [i * (count - 1) // (_VALUES - 1) for i in range(_VALUES)]


def _difference(ours: list[_Sample], theirs: list[_Sample]) -> tuple[int, str] | None:
    """Which sample differs, and in what; None if none does."""
    for position, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if len(mine) != len(other):
            return position, f"{len(mine)} and {len(other)} parts"
        for a, b in zip(mine, other, strict=True):
            if (a.path, a.kind, a.exact) != (b.path, b.kind, b.exact):
                return position, f"{a.path}: {a.kind} {a.exact}, and {b.path}: {b.kind} {b.exact}"
            if not _close(a.values, b.values):
                return position, f"{a.path}: {a.kind}, other values"
    return None


def _close(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    finite = [(a, b) for a, b in zip(ours, theirs, strict=True) if math.isfinite(a) and math.isfinite(b)]
    odd = [(a, b) for a, b in zip(ours, theirs, strict=True) if not (math.isfinite(a) and math.isfinite(b))]
    if any(repr(a) != repr(b) for a, b in odd):
        return False
    scale = sum(abs(a) + abs(b) for a, b in finite) / 2
    return sum(abs(a - b) for a, b in finite) <= _CLOSE * scale


def _unlike_first(values: Sequence[Any]) -> list[int]:
    return [rank for rank, value in enumerate(values) if value != values[0]]


def _refusal(name: str, differing: list[int], what: str) -> ConfigError:
    return ConfigError(
        f"{name} differs between the ranks: rank{'s' if len(differing) > 1 else ''} {', '.join(map(str, differing))} "
        f"{'have' if len(differing) > 1 else 'has'} other data than rank 0, {what}. Either give every rank the same whole data "
        "set, and hvdtrain cuts it over the ranks (no DistributedSampler, no part for each rank); or keep the parts, and say so: "
        "partition='sample-own' (--partition sample-own). In a loop of your own replica.backward(loss, samples=len(batch)) counts them"
    )
