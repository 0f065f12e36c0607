"""The loops that do not train: evaluation and prediction, each sample once; and how the data of a Trainer are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from hvdtrain.backends.base import Backend
from hvdtrain.backends.replica import Replica
from hvdtrain.data.rank_batches import RankBatches, sample_count
from hvdtrain.data.rank_stream import RankStream, evaluation_of
from hvdtrain.data.same_data import check_same_data
from hvdtrain.data.sample_count import SampleCount
from hvdtrain.data.source import Source, source_of
from hvdtrain.data.streams import is_stream
from hvdtrain.errors import ConfigError
from hvdtrain.training.counting import Counting
from hvdtrain.training.epoch_metrics import described
from hvdtrain.training.evaluation import evaluate
from hvdtrain.training.precision import Precision
from hvdtrain.training.predicting import destination, predict
from hvdtrain.training.same_call import check_same_call
from hvdtrain.training.task import Learning

Data = Dataset[Any] | DataLoader[Any] | Iterable[Any] | Callable[[], Iterable[Any]]

_BATCH_SIZE = 64  # samples per rank, where nobody says another


class InferenceLoop:
    """Evaluates and predicts for a `hvdtrain.Trainer`, whose arguments these are.

    Args:
        backend: Running.
        replica: Its inference model is called.
        task: Gives metrics and outputs.
        precision: Of the forward pass.
        counting: Says what the metrics of a batch are means over.
        seed: Of augmentation in loader processes.
        workers: Loader processes per rank, where a DataLoader does not say.
        collate: Makes the batches, where a DataLoader does not say.
        callbacks: Their description, which must be the same on all ranks.
        around: What is entered around every evaluation and prediction.
    """

    def __init__(
        self,
        backend: Backend,
        replica: Replica,
        task: Learning,
        precision: Precision,
        counting: Counting,
        *,
        seed: int,
        workers: int,
        collate: Callable[[list[Any]], Any] | None,
        callbacks: Any,
        around: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._backend, self._replica, self._task, self._precision = backend, replica, task, precision
        self._counting, self._seed, self._workers, self._collate = counting, seed, workers, collate
        self._callbacks, self._around = callbacks, around

    def source(self, data: Any, shuffle: bool = False, **cut: Any) -> Source:
        """What to load: as a DataLoader says, and else as the Trainer was told."""
        own = isinstance(data, DataLoader | RankBatches | RankStream)
        said = source_of(
            data.source if isinstance(data, RankBatches | RankStream) else data,
            shuffle=None if own or is_stream(data) else shuffle,
            **cut,
        )
        return replace(said, collate=said.collate or self._collate, workers=said.workers or self._workers)

    def sample_count(self, source: Source) -> SampleCount | None:
        """What sees that samples are missing from a batch, where that would matter."""
        return sample_count(source, self._backend, seed=self._seed) if self._counting.trusts_indices else None

    def evaluate(self, data: Data, batch_size: int | None, partition: str | None, *, step: int) -> dict[str, float]:
        """As `hvdtrain.Trainer.evaluate`, after ``step`` steps of training."""
        source = self.source(data, partition=partition)
        self._backend.assemble(f"an evaluation after step {step}")
        arguments = {"epoch_metrics": described(self._task), "callbacks": self._callbacks}
        check_same_call(self._backend, "evaluate", arguments)
        check_same_data(source, self._backend, seed=self._seed, name="the evaluation data")
        return self.metrics(source, batch_size or source.batch_size or _BATCH_SIZE, self.sample_count(source))

    def metrics(self, source: Source, batch_size: int, seen: SampleCount | None) -> dict[str, float]:
        """Compute the metrics of data that the ranks have compared already.

        Raises:
            ConfigError: On every rank: there is no sample, or metrics cannot be averaged.
        """
        with self._precision.arithmetic(), self._around():
            count = self._counting.trusts_indices
            batches = evaluation_of(source, self._backend, batch_size=batch_size, seed=self._seed, count=count)
            metrics = evaluate(self._backend, self._replica, self._task, self._precision, batches, self._counting, seen)
        if not metrics:
            raise ConfigError("the evaluation data set is empty; give one with samples, or none")
        return metrics

    def predict(
        self, data: Dataset[Any] | DataLoader[Any], batch_size: int | None, to: Path | str, *, step: int
    ) -> Any:
        """As `hvdtrain.Trainer.predict`, after ``step`` steps of training."""
        source = self.source(data)
        if source.is_stream:
            raise ConfigError(
                "predictions come in the order of a data set with numbers, which a stream does not have; pass a list of its samples"
            )
        size = batch_size or source.batch_size or _BATCH_SIZE
        self._backend.assemble(f"a prediction after step {step}")
        arguments = {"batch_size": size, "to": destination(to), "callbacks": self._callbacks}
        check_same_call(self._backend, "predict", arguments)
        if source.partition != "batch":
            raise ConfigError(
                f"predictions come in the order of one data set that every rank is given, and this loader cuts it by partition="
                f"{source.partition!r}; pass the data set itself"
            )
        check_same_data(source, self._backend, seed=self._seed, name="the data")
        source = replace(source, batch_size=size, shuffle=False, last_batch="keep")
        batches = RankBatches(source, self._backend, seed=self._seed)
        with self._precision.arithmetic(), self._around():
            return predict(self._backend, self._replica, self._task, self._precision, batches, to)
