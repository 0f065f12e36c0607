"""What a replica is asked for, and what it says of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdtrain.settings.sync import Sync

if TYPE_CHECKING:
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
    """

    find_unused_parameters: bool = False
    static_graph: bool = False
    bucket_bytes: int | None = None
    reduce_dtype: torch.dtype | None = None
    compression: Compression | None = None
    sync: Sync | None = None
    sync_group: str | int | None = None
    shard_modules: str | None = None

    @property
    def allows_unused(self) -> bool:
        """Whether the loss may not depend on some parameters; of a static graph the engine finds that out itself."""
        return self.find_unused_parameters or self.static_graph


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
