"""What one `hvdtrain.Trainer.fit` will do: its arguments, checked and compared over the ranks, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from hvdtrain.data.rank_batches import RankBatches, sample_count
from hvdtrain.data.rank_stream import Batches, RankStream, batches_of
from hvdtrain.data.same_data import check_same_data
from hvdtrain.data.sample_count import SampleCount
from hvdtrain.data.source import Source, source_of
from hvdtrain.data.streams import is_stream
from hvdtrain.errors import ConfigError
from hvdtrain.training.checkpoint_files import Saved
from hvdtrain.training.epoch_metrics import described
from hvdtrain.training.parts import Parts
from hvdtrain.training.position import Position
from hvdtrain.training.same_call import check_same_call

Data = Dataset[Any] | DataLoader[Any] | Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class EvaluationData:
    """What is evaluated.

    Attributes:
        source: The data.
        batch_size: Samples per rank and batch.
        seen: Sees that samples are missing from a batch, where that would matter.
    """

    source: Source
    batch_size: int
    seen: SampleCount | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FitPlan:
    """The same on every rank, but for its share of the data.

    Attributes:
        batches: This rank's share of the training data.
        seen: Sees that samples are missing from a batch, where that would matter.
        epochs: To be completed, those before a resume included.
        max_steps: After which training ends, if the epochs are not done before; infinite for no such number.
        evaluation: What is evaluated; None for nothing.
        eval_every: Epochs between evaluations.
        resume_from: A checkpoint to go on from.
    """

    batches: Batches
    seen: SampleCount | None
    epochs: int
    max_steps: float
    evaluation: EvaluationData | None
    eval_every: int
    resume_from: Saved | Path | str | None

    def goes_on(self, position: Position) -> bool:
        """Whether there is anything to train after a position."""
        return position.epoch < self.epochs and position.steps < self.max_steps

    def total_steps(self, position: Position) -> float:
        """Steps from the first one to the run's end, as seen from a position; infinite if nobody knows."""
        batches = self.batches
        of_epoch = min(math.ceil(position.samples / batches.global_batch_size), batches.steps_in(1))
        left = batches.steps_in(max(0, self.epochs - position.epoch)) - of_epoch
        return min(position.steps + max(0, left), self.max_steps)


def plan_fit(
    parts: Parts,
    train_data: Data,
    eval_data: Data | None,
    *,
    epochs: int,
    max_steps: int | None,
    batch_size: int | None,
    global_batch_size: int | None,
    eval_batch_size: int | None,
    eval_every: int,
    partition: str | None,
    resume_from: Saved | Path | str | None,
    **last: Any,
) -> FitPlan:
    """Refuse, on every rank, what would leave ranks waiting for each other or training on the wrong samples; else plan.

    Args:
        parts: The Trainer's.
        train_data, eval_data: And the others: as `hvdtrain.Trainer.fit` has them.
        last: ``last_batch`` and ``drop_last``.

    Raises:
        ConfigError: An argument cannot work, or the ranks were given different arguments or data.
        CollectiveError: Some rank did not call it.
    """
    _check_numbers(epochs, max_steps, eval_every, eval_batch_size)
    parts.pacemaker.check_evaluated(epochs == 0 or eval_data is not None)
    backend, options = parts.backend, parts.options
    backend.assemble("fit")
    source = source_for(parts, train_data, shuffle=True, partition=partition, **last)
    eval_source = None if eval_data is None else source_for(parts, eval_data, partition=partition)
    eval_batch_size = eval_batch_size or (eval_source.batch_size if eval_source else None)
    asked = {
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size or (None if global_batch_size else source.batch_size),
        "global_batch_size": global_batch_size,
        "eval_batch_size": eval_batch_size,
        "eval_every": eval_every,
        "resuming": resume_from is not None,
    }
    _compare(parts, source, eval_source, asked)
    if batch_size is not None and global_batch_size is not None:
        raise ConfigError("give either batch_size (per rank and micro-batch) or global_batch_size")
    batches = batches_of(
        source if batch_size is None else replace(source, batch_size=batch_size),
        backend,
        global_batch_size=global_batch_size,
        accumulate=options.accumulate,
        seed=options.seed,
        equal_passes=parts.in_step,
        keep_states=parts.checkpoints is not None or bool(parts.events),
        count=parts.lesson.counting.trusts_indices,
    )
    seen = samples_seen(parts, source)
    per_rank = max(1, math.ceil(batches.global_batch_size / backend.world_size))
    evaluation = None
    if eval_source is not None:
        evaluation = EvaluationData(eval_source, eval_batch_size or per_rank, samples_seen(parts, eval_source))
    return FitPlan(
        batches=batches,
        seen=seen,
        epochs=epochs,
        max_steps=math.inf if max_steps is None else max_steps,
        evaluation=evaluation,
        eval_every=eval_every,
        resume_from=resume_from,
    )


def plan_evaluation(parts: Parts, data: Data, batch_size: int | None, partition: str | None) -> EvaluationData:
    """The same for `hvdtrain.Trainer.evaluate`."""
    source = source_for(parts, data, partition=partition)
    parts.backend.assemble(f"an evaluation after step {parts.position.steps}")
    arguments = {"epoch_metrics": described(parts.lesson.task), "callbacks": parts.events.described}
    check_same_call(parts.backend, "evaluate", arguments)
    check_same_data(source, parts.backend, seed=parts.options.seed, name="the evaluation data")
    return EvaluationData(source, batch_size or source.batch_size or 64, samples_seen(parts, source))


def source_for(parts: Parts, data: Any, shuffle: bool = False, **cut: Any) -> Source:
    """What to load: as a DataLoader says, and else as the Trainer was told."""
    own = isinstance(data, DataLoader | RankBatches | RankStream)
    said = source_of(
        data.source if isinstance(data, RankBatches | RankStream) else data,
        shuffle=None if own or is_stream(data) else shuffle,
        **cut,
    )
    collate = said.collate or parts.options.collate or getattr(parts.lesson.task, "collate", None)
    return replace(said, collate=collate, workers=said.workers or parts.options.workers)


def samples_seen(parts: Parts, source: Source) -> SampleCount | None:
    """What sees that samples are missing from a batch, where that would matter."""
    if not parts.lesson.counting.trusts_indices:
        return None
    return sample_count(source, parts.backend, seed=parts.options.seed)


def _check_numbers(epochs: int, max_steps: int | None, eval_every: int, eval_batch_size: int | None) -> None:
    for name, value, least in (
        ("epochs", epochs, 0),
        ("max_steps", max_steps, 0),
        ("eval_every", eval_every, 1),
        ("eval_batch_size", eval_batch_size, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} must be {least} or more, got {value}")


def _compare(parts: Parts, source: Source, eval_source: Source | None, asked: dict[str, Any]) -> None:
    """Refuse, on every rank, what is not the same on all of them."""
    backend, seed = parts.backend, parts.options.seed
    check_same_call(
        backend,
        "fit",
        asked
        | {
            "eval_data given": eval_source is not None,
            "train_data a stream": source.is_stream,
            "eval_data a stream": eval_source is not None and eval_source.is_stream,
            "epoch_metrics": described(parts.lesson.task),
            "last_batch": source.last_batch,
            "partition": source.partition,
            "shuffle": source.shuffle,
            "callbacks": parts.events.described,
            "checkpoints given": parts.checkpoints is not None,
        }
        | parts.options.compared(),
    )
    check_same_data(source, backend, seed=seed, name="train_data")
    if eval_source is not None:
        check_same_data(eval_source, backend, seed=seed, name="eval_data")
