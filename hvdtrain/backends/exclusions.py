"""Features that cannot be had together, or not on an engine: the refusals and the documentation are made of this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    "reduce_dtype": "reduce_dtype= (--reduce-dtype)",
    "sync": "sync= (--sync)",
}
"""Features that may meet, each with how it is asked for."""


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
        "compression",
        "weights are exchanged as they are, and gradients not at all",
        "leave one of them out",
    ),
    Exclusion(
        "sync",
        "reduce_dtype",
        "weights are exchanged as they are, and gradients not at all",
        "leave one of them out",
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
)


def exclusion(feature: str, other: str) -> Exclusion | None:
    """The row of two features, or of a feature and an engine; None if they go together."""
    return next((row for row in EXCLUSIONS if {row.feature, row.other} == {feature, other}), None)


def check_combination(asked: Mapping[str, object], engine: str = "") -> None:
    """Refuse what does not go together.

    Args:
        asked: Keys of `ASKED_BY`, and whether each is wanted.
        engine: The backend's name, where that plays a part.

    Raises:
        ConfigError: Two of them, or one and the engine, exclude each other; says why and what to do.
    """
    present = {engine, *(name for name, wanted in asked.items() if wanted)}
    for row in EXCLUSIONS:
        if {row.feature, row.other} <= present:
            raise ConfigError(row.sentence)
