"""What a replica's model is asked without being trained, over data that is cut over the ranks: metrics, and outputs in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdtrain.backends.base import Backend
from hvdtrain.backends.replica import Replica
from hvdtrain.data.rank_batches import RankBatches
from hvdtrain.data.rank_stream import batches_of, evaluation_of
from hvdtrain.data.same_data import check_same_data
from hvdtrain.data.sample_count import SampleCount
from hvdtrain.data.source import Source
from hvdtrain.errors import ConfigError
from hvdtrain.training.counting import Counting
from hvdtrain.training.evaluation import evaluate
from hvdtrain.training.precision import Precision
from hvdtrain.training.predicting import predict
from hvdtrain.training.task import Learning


class Evaluator:
    """Evaluates and predicts on all ranks; each of them must call it alike.

    Args:
        backend: A running backend.
        replica: Whose model is asked, with the weights that all ranks share and rank 0's buffers.
        precision: Of the forward pass.
        seed: Of the order in which samples are read.
    """

    def __init__(self, backend: Backend, replica: Replica, precision: Precision, *, seed: int) -> None:
        self._backend, self._replica, self._precision, self._seed = backend, replica, precision, seed

    def metrics(
        self,
        task: Learning,
        counting: Counting,
        source: Source,
        batch_size: int,
        seen: SampleCount | None,
        inside: AbstractContextManager[None],
    ) -> dict[str, float]:
        """Compute a task's metrics over all samples.

        Args:
            task: Its `metrics` and ``epoch_metrics``.
            counting: What the task's metrics are means over.
            source: The data.
            batch_size: Samples per rank and batch.
            seen: Counts the samples that a batch has.
            inside: Surrounds the forward passes.

        Raises:
            ConfigError: On every rank: there are no samples, or some metric cannot be averaged.
        """
        with self._asking(inside):
            batches = evaluation_of(
                source,
                self._backend,
                batch_size=batch_size,
                seed=self._seed,
                count=counting.trusts_indices,
                equal_passes=self._replica.is_cut,
            )
            found = evaluate(self._backend, self._replica, task, self._precision, batches, counting, seen)
        if not found:
            raise ConfigError("the evaluation data set is empty; give one with samples, or none")
        return found

    def outputs(
        self, task: Learning, source: Source, batch_size: int, to: Path | str, inside: AbstractContextManager[None]
    ) -> Any:
        """Compute the outputs for all samples, in their order (see `hvdtrain.training.predicting.predict`).

        Args:
            task: Its ``predict``, if it has one.
            source: The data, a data set that every rank holds.
            batch_size: Samples per rank and batch.
            to: "rank0", "all", or the folder of files.
            inside: Surrounds the forward passes.

        Raises:
            ConfigError: On every rank: the data has no order, is cut in another way, or differs; outputs do not fit together.
            OutputError: On every rank: the files cannot be written.
        """
        if source.partition != "batch":
            raise ConfigError(
                f"predictions come in the order of one data set that every rank is given, and this loader cuts it by partition="
                f"{source.partition!r}; pass the data set itself"
            )
        check_same_data(source, self._backend, seed=self._seed, name="the data")
        last = source.length % (batch_size * self._backend.world_size)
        short = self._replica.is_cut and 0 < last < self._backend.world_size  # some rank would have no sample of it
        source = replace(source, batch_size=batch_size, shuffle=False, last_batch="merge" if short else "keep")
        batches = batches_of(source, self._backend, seed=self._seed, equal_passes=self._replica.is_cut)
        assert isinstance(batches, RankBatches)
        with self._asking(inside):
            return predict(self._backend, self._replica, task, self._precision, batches, to)

    @contextmanager
    def _asking(self, inside: AbstractContextManager[None]) -> Iterator[None]:
        with self._precision.arithmetic(), self._replica.shared_weights(), inside:
            yield
