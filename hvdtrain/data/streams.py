"""Data that is read from its beginning to its end, and how one such stream is read by several ranks.

A stream that can split itself is asked to: by `datasets.distributed.split_dataset_by_node` if it is Hugging Face's, by its
list of shards if it is a webdataset pipeline, by its own ``shard(num_shards, index)`` if it has that. Every other one is read
whole by every rank and loader process, and each keeps its samples: no file is opened by one rank alone then, but nothing is
asked of the stream except that it yields the same samples, in the same order, everywhere.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset
from torch.utils.data._utils import worker as torch_worker

from hvdtrain.errors import ConfigError

STRIDE = "whole: each rank keeps its samples"
_HUGGING_FACE = "by datasets.distributed.split_dataset_by_node"
_WEBDATASET = "by its list of shards"
_OWN = "by its shard()"


def is_stream(data: Any) -> bool:
    """Whether data is read from its beginning: an `IterableDataset`, what has ``__iter__`` and cannot be indexed, or a
    function of no arguments that returns such.
    """
    if isinstance(data, IterableDataset):
        return True
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return False
    return hasattr(data, "__iter__") or (callable(data) and not isinstance(data, type))


def check_repeatable(stream: Any) -> None:
    """Refuse what can be read only once.

    Raises:
        ConfigError: Says what to give instead.
    """
    if isinstance(stream, Iterator) and not isinstance(stream, IterableDataset):  # which begins anew in its __iter__
        remedy = (
            "torchdata.nodes.Loader(node)"
            if hasattr(stream, "reset") and hasattr(stream, "get_state")
            else "the function that makes it, or an object whose __iter__ does"
        )
        raise ConfigError(
            f"a {type(stream).__name__} can be read only once, and training begins it anew; give {remedy}"
        )


def name_of(stream: Any) -> str:
    """What a message calls a stream."""
    return getattr(stream, "__qualname__", None) or type(stream).__name__


def way_of(stream: Any) -> str:
    """How a stream is read by several ranks, for people; `STRIDE` where it cannot split itself."""
    if _is_of(stream, "datasets", "IterableDataset"):
        return _HUGGING_FACE
    if _is_of(stream, "webdataset", "DataPipeline") and _over_nodes(stream):
        return _WEBDATASET
    return _OWN if callable(getattr(stream, "shard", None)) else STRIDE


def part_of(stream: Any, *, rank: int, world_size: int, worker: int, workers: int) -> Any:
    """Return what one of a rank's loader processes reads; the whole where the stream cannot split itself.

    Called in the process that reads. Where the stream does not split itself over loader processes, this one looks from
    now on like none to it, so that it does not do so on its own as well.

    Args:
        stream: The whole.
        rank: This rank.
        world_size: Ranks.
        worker: Of this rank's ``workers``, which read a stream each.
        workers: At least 1.
    """
    way = way_of(stream)
    if way == _HUGGING_FACE:
        split = importlib.import_module("datasets.distributed").split_dataset_by_node
        return split(stream, rank=rank, world_size=world_size)
    if way == _WEBDATASET:
        return _with_shards_of(stream, rank, world_size)
    torch_worker._worker_info = None
    if way == _OWN:
        return stream.shard(num_shards=world_size * workers, index=rank * workers + worker)
    return stream


def begin(stream: Any) -> Iterable[Any]:
    """Return what iterates over a stream: a function is called."""
    samples: Iterable[Any] = stream if hasattr(stream, "__iter__") else stream()
    return samples


def set_epoch(stream: Any, epoch: int) -> None:
    """Tell a stream that wants to know which epoch begins."""
    tell = getattr(stream, "set_epoch", None)
    if callable(tell):
        tell(epoch)


def keeps_state(stream: Any) -> bool:
    """Whether a stream can say where it is, and go on there."""
    return callable(getattr(stream, "state_dict", None)) and callable(getattr(stream, "load_state_dict", None))


def _is_of(stream: Any, package: str, name: str) -> bool:
    """Whether it is an instance of a class of a package, which need not be installed."""
    cls = getattr(sys.modules.get(package), name, None)
    return isinstance(cls, type) and isinstance(stream, cls)


# -- webdataset -------------------------------------------------------------------------------------------------------


class _EveryNth:
    """A stage of a pipeline that keeps this rank's shards."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size

    def __call__(self, shards: Iterable[Any]) -> Iterator[Any]:
        return itertools.islice(shards, self._rank, None, self._world_size)


def _over_nodes(pipeline: Any) -> list[int]:
    """The stages that split shards over ranks as webdataset sees them: by torchrun's variables or torch.distributed."""
    module = sys.modules["webdataset"].shardlists
    known: list[Callable[..., Any]] = [module.split_by_node, module.single_node_only]
    return [number for number, stage in enumerate(pipeline.pipeline) if any(stage is one for one in known)]


def _with_shards_of(pipeline: Any, rank: int, world_size: int) -> Any:
    changed = copy.copy(pipeline)
    changed.pipeline = list(pipeline.pipeline)
    for number in _over_nodes(pipeline):
        changed.pipeline[number] = _EveryNth(rank, world_size)
    return changed
