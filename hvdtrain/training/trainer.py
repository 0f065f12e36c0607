"""The training loop, and nothing else: fetch, forward, backward, exchange, step, log; evaluate; save.

Which engine moves the gradients is the backend's business, what is learned the task's, how numbers are written down the
logger's. The loop promises that every sample counts once: whatever the number of ranks, the length of the data or the
batch size, a step follows the gradient of the mean loss over the global batch, and an evaluation is the mean over all
samples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from hvdtrain.backends.base import Backend
from hvdtrain.backends.exclusions import check_combination
from hvdtrain.backends.laps import Laps
from hvdtrain.backends.reduce_dtype import reduce_dtype_of
from hvdtrain.backends.replica import Replica
from hvdtrain.data.rank_batches import RankBatches, RankStep, sample_count
from hvdtrain.data.rank_stream import Batches, RankStream, StreamStep, batches_of
from hvdtrain.data.same_data import check_same_data
from hvdtrain.data.sample_count import SampleCount
from hvdtrain.data.source import Source, source_of
from hvdtrain.data.streams import is_stream
from hvdtrain.errors import ConfigError, Preempted
from hvdtrain.observe.logger import EvalRecord, Logger, NullLogger, StepRecord
from hvdtrain.optim.sharded import ShardedOptimizer
from hvdtrain.sync_batch_norm import SyncBatchNorm
from hvdtrain.training.activation_checkpointing import checkpoint_activations
from hvdtrain.training.checkpoint import Checkpoints
from hvdtrain.training.checkpoint_files import Saved
from hvdtrain.training.checkup import Checkup, Tally, norm_seconds
from hvdtrain.training.compiling import compile_ahead, compile_model
from hvdtrain.training.counting import Counting
from hvdtrain.training.epoch_metrics import described
from hvdtrain.training.evaluator import Evaluator
from hvdtrain.training.events import Events
from hvdtrain.training.ledger import FitResult, Ledger
from hvdtrain.training.lone_sample import batches_without_samples_explained, lone_samples_explained
from hvdtrain.training.loop_state import LoopState, rehearse
from hvdtrain.training.position import PendingLoss, Position, check_loss
from hvdtrain.training.precision import Precision
from hvdtrain.training.predicting import destination
from hvdtrain.training.random_numbers import OwnRandomNumbers
from hvdtrain.training.resume import go_on, resume, save
from hvdtrain.training.same_call import check_same_call
from hvdtrain.training.schedules import Pacemaker
from hvdtrain.training.task import Learning, Supervised

_log = logging.getLogger(__name__)

Data = Dataset[Any] | DataLoader[Any] | Iterable[Any] | Callable[[], Iterable[Any]]


class Trainer:
    """Trains one model on all ranks of a backend.

    Seed alike on all ranks before models and data are made (``torch.manual_seed``). While `fit` trains, each rank draws
    random numbers of its own, which follow from what was seeded, so that dropout and augmentation differ between ranks and
    are the same in the next run; rank 0, and so a world of one, goes on with what was seeded. Afterwards all ranks are in
    rank 0's state (see `hvdtrain.OwnRandomNumbers`).

    Args:
        backend: A running backend.
        model: Moved to the backend's device and the precision's type unless the optimizer already holds its parameters
            there; built the same way on every rank.
        optimizer: Over the model's parameters. Make it after moving the model to `backend.device`.
        loss: ``loss(model(x), y)`` for data of ``(x, y)``, a mean over samples; or give ``task``.
        task: What to learn (see `Learning`), for anything else.
        schedule: A torch scheduler over the optimizer.
        schedule_interval: "step" to step it after every optimizer step, "epoch" after every epoch. A ReduceLROnPlateau is
            stepped after every evaluation instead, but for one that is made only because the run ends.
        schedule_metric: With which metric of the evaluation such a schedule is stepped.
        precision: "fp32", "tf32", "fp64", "bf16", "fp16", or "bf16-pure" with a `hvdtrain.MasterWeights` (see
            `hvdtrain.training.precision`).
        channels_last: Let the 4-D weights and inputs of convolutions lie channels last in memory.
        accumulate: Micro-batches per optimizer step and rank.
        clip_norm: Largest L2 norm of the averaged gradient.
        on_nan: "stop" all ranks at a NaN or infinite loss, or "skip" the step on all ranks.
        seed: Of the order of the samples and of augmentation in loader processes.
        workers: Loader processes per rank.
        collate: As for `torch.utils.data.DataLoader`; the task's own `collate`, if it has one, unless given.
        logger: Told of steps and evaluations, as plain numbers.
        log_every: Steps between logged steps.
        progress: Gets a record of a step between logged ones, about once a second; for a display, not for a file.
        checkpoints: Where to save; nothing is saved without.
        checkpoint_every: Steps between checkpoints, besides the one after each epoch; 0 for none besides.
        checkpoint_minutes: Minutes of wall time after any checkpoint until the next, by rank 0's clock, at the first step at
            which the ranks talk anyway (about once a second); None for none by time.
        stop_requested: Asked about once a second; when it is true on any rank, all save and raise `Preempted`.
        callbacks: Objects that are told what happens, the same on every rank (see `hvdtrain.training.events.Callback`).
        checkpoint_modules: Modules whose activations are computed again in the backward pass, to need less memory; see
            `hvdtrain.training.activation_checkpointing.checkpoint_activations`, also for
        checkpoint_policy: "full" or "selective".
        compile: Compile the model's forward and backward pass, or with which arguments of `torch.compile`; the model stays
            the same object.
        replica_options: For `Backend.replicate`, such as ``find_unused_parameters=True`` or ``shard_modules=``.

    Raises:
        ConfigError: An argument cannot work.
        ModelMismatch: The ranks hold different models.
    """

    def __init__(
        self,
        backend: Backend,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        task: Learning | None = None,
        schedule: LRScheduler | None = None,
        schedule_interval: str = "step",
        schedule_metric: str = "loss",
        precision: str = "fp32",
        channels_last: bool = False,
        accumulate: int = 1,
        clip_norm: float | None = None,
        on_nan: str = "stop",
        seed: int = 0,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        logger: Logger | None = None,
        log_every: int = 10,
        progress: Callable[[StepRecord], None] | None = None,
        checkpoints: Checkpoints | None = None,
        checkpoint_every: int = 0,
        checkpoint_minutes: float | None = None,
        stop_requested: Callable[[], bool] | None = None,
        callbacks: Sequence[Any] = (),
        checkpoint_modules: str | None = None,
        checkpoint_policy: str = "full",
        compile: bool | Mapping[str, Any] = False,
        **replica_options: Any,
    ) -> None:
        if (loss is None) == (task is None):
            raise ConfigError("give the Trainer either loss= (for data of (x, y)) or task=")
        if isinstance(optimizer, LBFGS):
            raise ConfigError(
                "LBFGS evaluates the loss several times a step, which this loop does not; choose another optimizer"
            )
        _check_numbers(accumulate=accumulate, log_every=log_every, checkpoint_minutes=checkpoint_minutes)
        if on_nan not in ("stop", "skip"):
            raise ConfigError(f"on_nan must be 'stop' or 'skip', got {on_nan!r}")
        check_combination(
            {
                **replica_options,
                "accumulate": accumulate > 1,
                "checkpoint_modules": checkpoint_modules is not None,
                "compile": compile is not False,
                "shard_optimizer": isinstance(optimizer, ShardedOptimizer),
                "clip_norm": clip_norm is not None,
                "on_nan": on_nan == "skip",
                "reduce_dtype": reduce_dtype_of(replica_options.get("reduce_dtype")) is not None,
                "channels_last": channels_last,
                "scaler": precision == "fp16",
            },
            backend.name,
        )
        self._pacemaker = Pacemaker(schedule, schedule_interval, schedule_metric)
        self._pacemaker.check_optimizer(optimizer)
        self._events = Events(callbacks)
        if checkpoints is not None:
            self._pacemaker.check_savable(optimizer)
            self._events.check_savable()
        described(task)  # refuses what cannot be computed
        self.backend = backend
        self.precision = Precision(precision, backend.device, channels_last=channels_last)
        self.precision.prepare(model, optimizer)
        if checkpoint_modules is not None:
            checkpoint_activations(model, checkpoint_modules, policy=checkpoint_policy)
        self._compile = compile is not False
        if self._compile:
            how = {} if compile is True else compile
            compile_model(model, how, shard_modules=replica_options.get("shard_modules"))  # type: ignore[arg-type]
        self.replica: Replica = backend.replicate(model, optimizer, **replica_options)
        self.laps = Laps.of(self.replica, backend.device)
        self.task: Learning = task if task is not None else Supervised(loss)  # type: ignore[arg-type]
        self._counting = Counting(self.task)
        self.position = Position()
        self._state = LoopState(
            backend,
            self.replica,
            schedule=schedule,
            scaler=self.precision.scaler,
            callbacks=self._events,
            position=self.position,
        )
        self._own_random_numbers = OwnRandomNumbers(backend)
        self._accumulate = accumulate
        self._clip_norm = clip_norm
        self._skip_nonfinite = on_nan == "skip"
        self._seed = seed
        self._workers = workers
        self._collate = collate or getattr(task, "collate", None)
        self._logger: Logger = logger or NullLogger()
        self._progress = progress
        self._checkpoints = checkpoints
        self._checkpoint_every, self._checkpoint_minutes = checkpoint_every, checkpoint_minutes
        self._checkup = Checkup(
            backend,
            log_every=log_every,
            stop_requested=stop_requested or (lambda: False),
            finish_requested=lambda: bool(self._events.stop_reason),
            failed=(lambda: False) if checkpoints is None else checkpoints.failed,
            save_every_s=math.inf if checkpoint_minutes is None else 60 * checkpoint_minutes,
            norm_s=norm_seconds(model),
        )
        self._evaluator = Evaluator(backend, self.replica, self.precision, seed=seed)
        self._seen: SampleCount | None = None  # of the data that is trained on
        self._pending_loss = PendingLoss(self.position, rank=backend.rank, skip_nonfinite=self._skip_nonfinite)
        self._ledger = Ledger(backend, self.position)
        together = any(isinstance(module, SyncBatchNorm) for module in model.modules())
        self._in_step = together or self.replica.is_cut  # every rank's every pass
        self._batches: Batches | None = None
        self._skipped = self._finishing = False  # the last step; training, by a callback of some rank

    # -- training -----------------------------------------------------------------------------------------------------

    def fit(
        self,
        train_data: Data,
        eval_data: Data | None = None,
        *,
        epochs: int = 1,
        max_steps: int | None = None,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        eval_every: int = 1,
        last_batch: str = "keep",
        drop_last: bool = False,
        partition: str | None = None,
        resume_from: Saved | Path | str | None = None,
    ) -> FitResult:
        """Train for some epochs; every rank must call it with the same arguments.

        Args:
            train_data: With ``__len__`` and ``__getitem__``; the same whole data on every rank, in a new random order
                each epoch. Or a DataLoader: of it are taken the data set, batch size, shuffling or sampler, drop_last,
                collate function and loader processes, and not its random numbers (see `Backend.loader`). Or a stream, which
                is read in its own order: an IterableDataset, what has ``__iter__`` alone, or a function that returns such.
            eval_data: Likewise; evaluated every ``eval_every`` epochs and at the end, each sample once.
            epochs: Passes over the data, those before a resume included; 0 to evaluate only.
            max_steps: End after so many optimizer steps, if that is earlier.
            batch_size: Samples per rank and micro-batch; or
            global_batch_size: samples per optimizer step over all ranks, which gives the same training for every world
                size. A rank's share may differ by one sample.
            eval_batch_size: Samples per rank and batch of an evaluation.
            eval_every: Epochs between evaluations.
            last_batch: What becomes of samples that do not fill a last global batch: "keep" trains on them as a shorter
                one, "drop" leaves them out in that epoch, "merge" joins them with the global batch before.
            drop_last: DataLoader's word for ``last_batch="drop"``.
            partition: Whether each global batch is cut over the ranks ("batch", the default), or once the data sets, so that
                each rank reads a part of its own ("sample", "sample-strided", "sample-node", "sample-own"); see `Backend.loader`.
            resume_from: A checkpoint to continue from: its folder, or what `Checkpoints.find` returned.

        Raises:
            ConfigError: An argument cannot work, the ranks were given different arguments or data, or the schedule needs
                evaluations and there is no evaluation data.
            CheckpointError: The checkpoint cannot be continued from.
            CollectiveError: Some rank did not call it; says which, and what it does.
            NonFiniteLoss: The loss became NaN or infinite (unless ``on_nan="skip"``).
            Preempted: Some rank was asked to stop; a checkpoint has been saved, if there is a place for it.
        """
        if epochs < 0:
            raise ConfigError(f"epochs must be 0 or more, got {epochs}")
        self._pacemaker.check_evaluated(epochs == 0 or eval_data is not None)
        self.backend.assemble("fit")
        source = self._source(train_data, shuffle=True, last_batch=last_batch, drop_last=drop_last, partition=partition)
        eval_source = None if eval_data is None else self._source(eval_data, partition=partition)
        self._check_call(
            source,
            eval_source,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size or (None if global_batch_size else source.batch_size),
            global_batch_size=global_batch_size,
            eval_batch_size=eval_batch_size or (eval_source.batch_size if eval_source else None),
            eval_every=eval_every,
            resuming=resume_from is not None,
        )
        if batch_size is not None and global_batch_size is not None:
            raise ConfigError("give either batch_size (per rank and micro-batch) or global_batch_size")
        batches = batches_of(
            source if batch_size is None else replace(source, batch_size=batch_size),
            self.backend,
            global_batch_size=global_batch_size,
            accumulate=self._accumulate,
            seed=self._seed,
            equal_passes=self._in_step,
            keep_states=self._checkpoints is not None or bool(self._events),
            count=self._counting.trusts_indices,
        )
        earlier, self._batches = self._batches, batches
        self._seen = self._sample_count(source)
        eval_seen = None if eval_source is None else self._sample_count(eval_source)
        total_steps = min(batches.steps_in(epochs), math.inf if max_steps is None else max_steps)
        per_rank = max(1, math.ceil(batches.global_batch_size / self.backend.world_size))
        eval_batch_size = eval_batch_size or (eval_source.batch_size if eval_source else None) or per_rank
        position, resumed_from = self.position, None
        with self.precision.arithmetic(), self._own_random_numbers:
            if resume_from is not None:
                resumed_from = resume(self._state, resume_from, position, self._seed, self.backend, batches)
                if position.steps < total_steps:
                    self._rehearse(batches)
            else:
                go_on(earlier, batches, position)
            position.cut = batches.cut
            if self._compile and position.steps < total_steps:
                compile_ahead(self.backend, self.replica, self._first_loss(batches))
            self._checkup.begin(position.steps)
            self._finishing = False
            self._events.started(self)
            if self._events:
                self._stop_if_asked()
            while not (self._finishing or position.has_ended(epochs, total_steps, batches.is_over)):
                self._train_epoch(batches, total_steps)
                ended = self._finishing or position.has_ended(epochs, total_steps, batches.is_over)
                regular = position.samples == 0 and position.epoch % eval_every == 0
                if eval_source is not None and (regular or ended):
                    self._evaluate_here(eval_source, eval_batch_size, eval_seen, regular=regular)
                self._save()
                self._stop_if_asked()
            if eval_source is not None and (epochs == 0 or position.evaluated_at < position.steps):
                self._evaluate_here(eval_source, eval_batch_size, eval_seen, regular=False)
            self.replica.settle()
            self._settle()
        return self._ledger.result(resumed_from, self._stop_reason())

    def _train_epoch(self, batches: Batches, total_steps: float) -> None:
        position, whole_epoch = self.position, True
        self.replica.module.train()
        self.laps.skip()
        for step in batches.steps(position.epoch, position.samples):
            self.laps.begin(timed=self._checkup.logs(position.steps + 1))
            with self._ledger.step(step.samples):
                self._train_step(step)
            position.advance(step.samples)
            self._events.stepped(self, step.samples, skipped=self._skipped)
            save = bool(self._checkpoint_every) and position.steps % self._checkpoint_every == 0
            if self._checkup.due(position.steps):
                save |= self._hold_checkup(total_steps)
            if save:
                self._save()
            if (self._finishing or position.steps >= total_steps) and not batches.is_over(position.samples):
                whole_epoch = False
                break
            self.laps.lap("other")
        self._pending_loss.look()
        whole = self.backend.all_reduce(
            torch.tensor([position.epoch_tally.loss_sum, position.epoch_tally.weight], dtype=torch.float64)
        ).tolist()
        position.train_loss = Tally(*whole).mean
        if whole_epoch:
            position.finish_epoch()
            self._pacemaker.after_epoch()
            self._events.finished_epoch(self)

    def _train_step(self, step: RankStep | StreamStep) -> None:
        """One global batch; also on a rank whose share of it is empty."""
        replica, precision = self.replica, self.precision
        for number, (loaded, indices) in enumerate(step, 1):
            batch = precision.cast(loaded)
            self.laps.lap("data")
            share = self._counting.share(batch, self._counting.samples(batch, indices, self._seen), step.samples)
            with replica.accumulate(last=number == len(step.sizes)):
                with precision.autocast(), batches_without_samples_explained(indices), lone_samples_explained():
                    loss = self.task.loss(replica.model, batch)
                check_loss(loss)
                if share.weight:
                    self._pending_loss.note(*self._counting.mean(loss, share))
                self.laps.lap("forward")
                replica.backward(precision.scale(loss), samples=indices, weight=share.weight, total=share.total)
                self.laps.lap("exchange" if number == len(step.sizes) else "backward")
        lr = replica.optimizer.param_groups[0]["lr"]
        self._ledger.lr = lr.clone() if isinstance(lr, Tensor) else lr  # a schedule writes into a tensor
        result = replica.step(
            clip_norm=self._clip_norm,
            scaler=precision.scaler,
            skip_nonfinite=self._skip_nonfinite,
            want_norm=self._checkup.wants_norm(self.position.steps + 1),
        )
        self._skipped = result.skipped
        if result.skipped:
            self.position.skipped_steps += 1
            _log.info("step %d: the gradient is not finite; no update on any rank", self.position.steps)
        else:
            self._pacemaker.after_step()
        self._ledger.gradient_norm = result.gradient_norm
        self.laps.lap("optimizer")

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, data: Data, *, batch_size: int | None = None, partition: str | None = None) -> dict[str, float]:
        """Compute the task's metrics over a data set, each sample once; every rank must call it.

        Args:
            data: As for `fit`; of a DataLoader, drop_last and shuffling play no part.
            batch_size: Samples per rank and batch; else the DataLoader's, or 64.
            partition: As for `fit`: which samples this rank may read.

        Returns:
            Each metric's mean over all samples, and the task's ``epoch_metrics`` over all of them, the same on every rank.

        Raises:
            ConfigError: The data set is empty or differs between the ranks, or what the task's `metrics` returned cannot be
                averaged; the message names the metric.
            CollectiveError: Some rank did not call it; says which, and what it does.
        """
        source = self._source(data, partition=partition)
        self.backend.assemble(f"an evaluation after step {self.position.steps}")
        callbacks = self._events.described
        check_same_call(self.backend, "evaluate", {"epoch_metrics": described(self.task), "callbacks": callbacks})
        check_same_data(source, self.backend, seed=self._seed, name="the evaluation data")
        return self._evaluate(source, batch_size or source.batch_size or 64, self._sample_count(source))

    def predict(
        self, data: Dataset[Any] | DataLoader[Any], *, batch_size: int | None = None, to: Path | str = "rank0"
    ) -> Any:
        """Compute the model's outputs for a data set, in its order, each sample once; every rank must call it.

        The task's ``predict(model, batch)`` gives them, if it has one; else the model is called with the batch, or with x of
        (x, y). Tensors and arrays have a row for each sample of the batch, lists an entry for each; they may be in tuples,
        dictionaries and dataclasses.

        Args:
            data: As for `evaluate`. A sampler of your own in a DataLoader says the order.
            batch_size: Samples per rank and batch; else the DataLoader's, or 64.
            to: "rank0" or "all" for the outputs of all samples, on the CPU, on rank 0 or on every rank. A path is a new
                folder, where rank 0 writes them batch by batch: a tensor or an array to ``NAME.npy``, a list to ``NAME.jsonl``
                with a line for each sample. NAME is the key in a dictionary, and "output" for a tensor alone.

        Returns:
            What the model gives for a batch, with all samples in it; None on the other ranks under "rank0". Or the folder.

        Raises:
            ConfigError: On every rank: the data set is empty or differs, or outputs do not show which sample they belong to,
                or do not fit together.
            OutputError: On every rank: the folder is not empty, or cannot be written.
            CollectiveError: Some rank did not call it; says which, and what it does.
        """
        source = self._source(data)
        if source.is_stream:
            raise ConfigError(
                "predictions come in the order of a data set with numbers, which a stream does not have; pass a list of its samples"
            )
        size = batch_size or source.batch_size or 64
        self.backend.assemble(f"a prediction after step {self.position.steps}")
        arguments = {"batch_size": size, "to": destination(to), "callbacks": self._events.described}
        check_same_call(self.backend, "predict", arguments)
        return self._evaluator.outputs(self.task, source, size, to, self._events.inference(self))

    def _evaluate(self, source: Source, batch_size: int, seen: SampleCount | None) -> dict[str, float]:
        inside = self._events.inference(self)
        return self._evaluator.metrics(self.task, self._counting, source, batch_size, seen, inside)

    def _evaluate_here(self, source: Source, batch_size: int, seen: SampleCount | None, *, regular: bool) -> None:
        """Evaluate at this position, and say it; an evaluation only because the run ends here steps no schedule."""
        position = self.position
        position.eval_metrics = self._evaluate(source, batch_size, seen)
        position.evaluated_at = position.steps
        self._logger.log_eval(EvalRecord(step=position.steps, epoch=position.epoch, metrics=position.eval_metrics))
        if regular:
            self._pacemaker.after_evaluation(position.eval_metrics)
        self._events.evaluated(self, regular=regular)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _source(self, data: Any, shuffle: bool = False, **cut: Any) -> Source:
        """What to load: as a DataLoader says, and else as this Trainer was told."""
        own = isinstance(data, DataLoader | RankBatches | RankStream)
        said = source_of(
            data.source if isinstance(data, RankBatches | RankStream) else data,
            shuffle=None if own or is_stream(data) else shuffle,
            **cut,
        )
        return replace(said, collate=said.collate or self._collate, workers=said.workers or self._workers)

    def _sample_count(self, source: Source) -> SampleCount | None:
        """What sees that samples are missing from a batch, where that would matter."""
        return sample_count(source, self.backend, seed=self._seed) if self._counting.trusts_indices else None

    def _check_call(self, source: Source, eval_source: Source | None, **arguments: Any) -> None:
        """Refuse, on every rank, what would leave the ranks waiting for each other or training on the wrong samples."""
        check_same_call(
            self.backend,
            "fit",
            arguments
            | {
                "eval_data given": eval_source is not None,
                "train_data a stream": source.is_stream,
                "eval_data a stream": eval_source is not None and eval_source.is_stream,
                "epoch_metrics": described(self.task),
                "last_batch": source.last_batch,
                "partition": source.partition,
                "shuffle": source.shuffle,
                "accumulate": self._accumulate,
                "seed": self._seed,
                "precision": self.precision.name,
                "channels_last": self.precision.channels_last,
                "callbacks": self._events.described,
                "log_every": self._checkup.log_every,
                "checkpoints given": self._checkpoints is not None,
                "checkpoint_every": self._checkpoint_every,
                "checkpoint_minutes": self._checkpoint_minutes,
            },
        )
        check_same_data(source, self.backend, seed=self._seed, name="train_data")
        if eval_source is not None:
            check_same_data(eval_source, self.backend, seed=self._seed, name="eval_data")

    def _hold_checkup(self, total_steps: float) -> bool:
        """Log, stop if asked, and return whether it is time for a checkpoint."""
        self._pending_loss.look()
        position = self.position
        logged = self._checkup.logs(position.steps)
        seconds = self.laps.take() if logged else ()
        verdict = self._checkup.hold(position.steps, position.take_recent(), seconds)
        if verdict.failed:
            self._settle()
        report = self._logger.log_step if logged else self._progress
        if report is not None:
            report(self._ledger.record(total_steps, verdict.tally.mean, verdict.shared if logged else None))
        if verdict.stop:
            self._stop()
        self._finishing |= verdict.finish
        return verdict.save

    def _stop_if_asked(self) -> None:
        """After an evaluation, which may have been long."""
        verdict = self._checkup.hold(self.position.steps, Tally())
        if verdict.stop:
            self._stop()
        self._finishing |= verdict.finish

    def _stop(self) -> None:
        path = self._save()
        self._settle()
        where = f"saved {path}" if path else "nothing was saved, because there is no place for checkpoints"
        raise Preempted(f"asked to stop after step {self.position.steps}; {where}")

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """End training as if this had been its last step, on all ranks; one rank's word is enough.

        `fit` evaluates and saves as at its planned end, and returns. After an epoch or an evaluation it ends there, within an
        epoch at the next step at which the ranks talk anyway: within about a second.

        Args:
            reason: For `FitResult.stopped`.
        """
        self._events.stop_reason = reason or "a callback ended it"

    def save(self, checkpoints: Checkpoints, *, last: str | None = None) -> None:
        """Write a checkpoint into a folder beside the run's own; every rank must call it.

        Called by a callback, it is written when the others have been told of the same event.

        Args:
            checkpoints: The folder's.
            last: The checkpoint that this run wrote there last, None for none: others in the folder are set aside.

        Raises:
            CheckpointError: On every rank: it could not be written.
        """

        def write() -> None:
            self._pending_loss.look()
            save(self._state, checkpoints, self.position, self._seed, self._batches, last=last)

        self._events.when_all_are_told(write)

    def keep_apart(self, checkpoints: Checkpoints) -> None:
        """Refuse a folder beside the run's own in which something else of this run writes, which would thin out its checkpoints.

        Raises:
            ConfigError: It is the run's own, or another callback's.
        """
        self._events.keep_apart(checkpoints, self._checkpoints)

    def _stop_reason(self) -> str:
        """Why the run ended early, the same on every rank."""
        if not self._finishing:
            return ""
        return next(reason for reason in self.backend.all_gather_object(self._events.stop_reason) if reason)

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def _save(self) -> str | None:
        if self._checkpoints is None:
            return None
        self._pending_loss.look()
        path = save(self._state, self._checkpoints, self.position, self._seed, self._batches)
        self._checkup.saved()
        self._events.saved(self, path)
        return path

    def _settle(self) -> None:
        """Know that what was saved is on the disk, or fail on all ranks."""
        if self._checkpoints is not None:
            self._checkpoints.settle(self.backend)

    def _rehearse(self, batches: Batches) -> None:
        forward = self._first_loss(batches)
        if forward is not None:
            rehearse(self.replica, forward)

    def _first_loss(self, batches: Batches) -> Callable[[nn.Module], Tensor] | None:
        """What computes the loss of this rank's first batch; None, on all ranks, if some rank has none."""
        first = batches.example(self.position.epoch)
        if first is None:
            return None
        batch = self.precision.cast(first)

        def forward(model: nn.Module) -> Tensor:
            with self.precision.autocast():
                return self.task.loss(model, batch)

        return forward


def _check_numbers(*, accumulate: int, log_every: int, checkpoint_minutes: float | None) -> None:
    for name, value in (("accumulate", accumulate), ("log_every", log_every)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if checkpoint_minutes is not None and not checkpoint_minutes > 0:
        raise ConfigError(f"checkpoint_minutes must be more than 0, got {checkpoint_minutes}")
