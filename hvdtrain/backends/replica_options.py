"""What a replica is asked for, checked and said in one way, and what it says of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdtrain.backends.exclusions import check_combination
from hvdtrain.backends.reduce_dtype import reduce_dtype_of
from hvdtrain.backends.units import nature_of
from hvdtrain.compression.choosing import chosen
from hvdtrain.errors import ConfigError
from hvdtrain.settings.sync import Sync, group_of, sync_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from hvdtrain.compression.base import Compression


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaOptions:
    """How an engine may exchange gradients; one that has no use for an option ignores it.

    Attributes:
        find_unused_parameters: Look, at every step, for parameters that the loss does not depend on. Needed when some
            parameters take part only sometimes, or only on some ranks; costs a walk over the graph.
        static_graph: Promise that the graph is the same at every step; allows the engine some short cuts.
        bucket_bytes: Gradients are exchanged in pieces of about this size; None for what suits the engine.
        reduce_dtype: The type in which gradients are exchanged; None for their own (see `hvdtrain.backends.reduce_dtype`).
        compression: How gradients are compressed (see docs/slow_networks.md); None for not at all.
        sync: How often ranks exchange weights instead of gradients; None to exchange gradients in every step.
        sync_group: Ranks among which nothing is compressed or put off, "node" or so many; None for each by itself.
        shard_modules: Cut the model over the ranks; a regular expression for the names of the modules that are gathered one
            at a time. None to keep all of it on every rank.
        as_type: ``reduce_dtype`` was asked for as a compression.
    """

    find_unused_parameters: bool = False
    static_graph: bool = False
    bucket_bytes: int | None = None
    reduce_dtype: torch.dtype | None = None
    compression: Compression | None = None
    sync: Sync | None = None
    sync_group: str | int | None = None
    shard_modules: str | None = None
    as_type: bool = False

    @property
    def allows_unused(self) -> bool:
        """Whether the loss may not depend on some parameters; of a static graph the engine finds that out itself."""
        return self.find_unused_parameters or self.static_graph

    @property
    def sends_less(self) -> bool:
        """Whether a compression was asked for, one of types too."""
        return self.compression is not None or self.as_type


def options_of(
    optimizer: Optimizer | None,
    engine: str,
    *,
    reduce_dtype: str | None,
    compression: str | Compression | None,
    sync: str | Sync | None,
    sync_group: str | int | None,
    shard_modules: str | None,
    find_unused_parameters: bool,
    static_graph: bool,
    bucket_bytes: int | None,
) -> ReplicaOptions:
    """Options as `Backend.replicate` takes them, of which none excludes another, the optimizer or the engine.

    Raises:
        ConfigError: There is no such value, or two of them exclude each other.
    """
    how, reduced = chosen(compression)
    seldom, group = sync_of(sync), group_of(sync_group)
    travels_as = reduce_dtype not in (None, "auto")
    check_combination({"compression": how is not None or reduced is not None, "reduce_dtype": travels_as})
    check_combination(
        {
            "reduce_dtype": travels_as or reduced is not None,
            "sync": seldom is not None,
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            "bucket_bytes": bucket_bytes is not None,
            "shard_modules": shard_modules is not None,
            **nature_of(optimizer),
        },
        engine,
    )
    if group is not None and how is None and seldom is None:
        raise ConfigError(
            f"sync_group={sync_group} (--sync-group) says inside which groups of ranks nothing is sent less, and nothing is said to be: give "
            "sync= (--sync) or compression= (--compression) too, fp16 and bf16 excepted, or leave it out"
        )
    return ReplicaOptions(
        find_unused_parameters=find_unused_parameters,
        static_graph=static_graph,
        bucket_bytes=bucket_bytes,
        reduce_dtype=reduce_dtype_of(reduced or reduce_dtype),
        compression=how,
        sync=seldom,
        sync_group=group,
        shard_modules=shard_modules,
        as_type=reduced is not None,
    )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What `Replica.step` did.

    Attributes:
        gradient_norm: The L2 norm of the averaged gradient before clipping, the same on every rank; None if nothing
            asked for it.
        skipped: The optimizer did not step, because the gradient was not finite (GradScaler, or ``skip_nonfinite``).
        samples: Of the global batch, over all ranks; None with ``sync=``, and where ``total=`` was given and a GPU would have to
            be waited for.
    """

    gradient_norm: Tensor | None
    skipped: bool
    samples: int | None
