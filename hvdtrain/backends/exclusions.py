"""Features that cannot be had together, or not on an engine: the refusals and the documentation are made of this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hvdtrain.errors import ConfigError

ASKED_BY = {
    "static_graph": "static_graph=True (--static-graph)",
    "accumulate": "several micro-batches a step (accumulate=, --accumulate)",
    "find_unused_parameters": "find_unused_parameters=True (--find-unused-parameters)",
    "checkpoint_modules": "checkpoint_modules= (--checkpoint-modules)",
    "compile": "compile=True (--compile)",
    "shard_optimizer": "a ShardedOptimizer (--shard-optimizer)",
    "clip_norm": "clip_norm= (--clip-norm)",
    "on_nan": 'on_nan="skip" (--on-nan skip)',
    "compression": "compression= (--compression)",
    "sync": "sync= (--sync)",
    "shard_modules": "shard_modules= (--shard-modules)",
    "bucket_bytes": "bucket_bytes= (--bucket-mb)",
    "reduce_dtype": "reduce_dtype= (--reduce-dtype)",
    "channels_last": "channels_last=True (--channels-last)",
    "master_weights": "MasterWeights (--precision bf16-pure)",
    "scaler": "a GradScaler (--precision fp16)",
    "uncut_optimizer": "an optimizer of torch's that is none of SGD and Adagrad (without fused), Adam, AdamW, NAdam, RAdam, Adamax, "
    "Adadelta, RMSprop and ASGD",
    "meeting_ranks": "a backward pass in which ranks exchange gradients, as batch normalisation over all ranks does (--sync-batch-norm)",
    "wide_parameters": "parameters of float64 or of complex numbers",
}
"""Features that may meet, each with how it is asked for."""


_UNASKED = ("none", "auto", "every-step")
"""Options' values that ask for nothing, as None and False do."""


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Two features, or a feature and an engine, that do not go together.

    Attributes:
        feature: A key of `ASKED_BY`.
        other: Another, or an engine's name.
        why: What would go wrong.
        instead: What to do.
    """

    feature: str
    other: str
    why: str
    instead: str

    @property
    def sentence(self) -> str:
        """What the user reads."""
        other = ASKED_BY.get(self.other)
        both = (
            f"{ASKED_BY[self.feature]} and {other} exclude each other"
            if other
            else f"{ASKED_BY[self.feature]} does not go with the backend {self.other}"
        )
        return f"{both}: {self.why}; {self.instead}"


EXCLUSIONS = (
    Exclusion(
        "static_graph",
        "accumulate",
        "the engine counts in its first step how often each gradient comes, and takes earlier micro-batches for another graph",
        "leave one of them out",
    ),
    Exclusion(
        "compression",
        "reduce_dtype",
        "both say as what gradients travel",
        "give one of them; compression fp16 and bf16 are reduce_dtype's types",
    ),
    Exclusion(
        "sync",
        "reduce_dtype",
        "weights are exchanged, and gradients not at all",
        "leave it out, or send less by another compression than fp16 and bf16, which are its types: int8",
    ),
    Exclusion(
        "sync",
        "shard_optimizer",
        "each rank needs a whole optimizer to train by itself",
        "leave one of them out",
    ),
    Exclusion(
        "sync",
        "on_nan",
        "a rank would skip a step by itself, and schedules would differ between the ranks",
        "leave one of them out",
    ),
    Exclusion(
        "sync",
        "master_weights",
        "an exchange of the 16-bit weights would round its float32 copies",
        "use float32 parameters and autocast, precision bf16",
    ),
    Exclusion(
        "sync",
        "scaler",
        "each rank would skip steps by itself",
        "use bfloat16, which needs none: precision bf16",
    ),
    Exclusion("sync", "meeting_ranks", "each rank trains by itself", "leave one of them out"),
    Exclusion(
        "reduce_dtype",
        "wide_parameters",
        "such a type is for gradients of float32 and less",
        "leave reduce_dtype out, or convert the model",
    ),
    Exclusion(
        "shard_modules",
        "find_unused_parameters",
        "ranks that use other parameters would gather others",
        "freeze what is not used, or use it",
    ),
    Exclusion("shard_modules", "static_graph", "it is DistributedDataParallel's", "leave static_graph out"),
    Exclusion(
        "shard_modules",
        "bucket_bytes",
        "each module that is named is exchanged as one piece",
        "leave bucket_bytes out, and name larger or smaller modules",
    ),
    Exclusion("shard_modules", "compression", "torch exchanges its gradients as they are", "leave compression out"),
    Exclusion("shard_modules", "sync", "no rank holds weights to train by itself", "leave sync out"),
    Exclusion("shard_modules", "reduce_dtype", "torch exchanges its gradients as they are", "leave reduce_dtype out"),
    Exclusion(
        "shard_modules",
        "channels_last",
        "torch cuts contiguous parameters alone",
        "leave one of them out",
    ),
    Exclusion(
        "shard_modules",
        "shard_optimizer",
        "the optimizer's state is cut with the parameters already",
        "hand in the plain optimizer",
    ),
    Exclusion(
        "shard_modules",
        "master_weights",
        "its copies are of whole parameters",
        "use float32 parameters and autocast, precision bf16",
    ),
    Exclusion(
        "shard_modules",
        "uncut_optimizer",
        "torch has its step for whole parameters alone, or rounds otherwise where they are cut",
        "use one of these",
    ),
    Exclusion(
        "shard_modules",
        "horovod",
        "torch's fully_shard needs a process group of torch.distributed",
        "use --backend torch (under torchrun) or --backend mpi (under mpirun), or cut the optimizer's state alone: "
        "hvdtrain.ShardedOptimizer (--shard-optimizer)",
    ),
)


def exclusion(feature: str, other: str) -> Exclusion | None:
    """The row of two features, or of a feature and an engine; None if they go together."""
    return next((row for row in EXCLUSIONS if {row.feature, row.other} == {feature, other}), None)


def sentence(feature: str, other: str) -> str:
    """What the user reads who asked for two features that exclude each other."""
    return next(row.sentence for row in EXCLUSIONS if {row.feature, row.other} == {feature, other})


def not_by(feature: str, engine: str) -> str:
    """What the user of an engine reads that lacks, as one in the table does, what a feature needs: another package's, for one."""
    row = next(row for row in EXCLUSIONS if row.feature == feature and row.other not in ASKED_BY)
    return replace(row, other=engine).sentence


def check_combination(asked: Mapping[str, object], engine: str = "") -> None:
    """Refuse what does not go together.

    Args:
        asked: Keys of `ASKED_BY`, each with whether it is wanted, or with its option's value.
        engine: The backend's name, where that plays a part.

    Raises:
        ConfigError: Two of them, or one and the engine, exclude each other; says why and what to do.
    """
    present = {engine, *(name for name, value in asked.items() if value and value not in _UNASKED)}
    for row in EXCLUSIONS:
        if {row.feature, row.other} <= present:
            raise ConfigError(row.sentence)
