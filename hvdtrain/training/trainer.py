"""The Trainer: what users give it, and what they ask of it. The loop itself is `hvdtrain.training.loop`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from hvdtrain.backends.base import Backend
from hvdtrain.data.rank_stream import Batches
from hvdtrain.errors import ConfigError
from hvdtrain.observe.logger import Logger, StepRecord
from hvdtrain.training.checkpoint import Checkpoints
from hvdtrain.training.checkpoint_files import Saved
from hvdtrain.training.fit_plan import Data, plan_evaluation, plan_fit, source_for
from hvdtrain.training.ledger import FitResult, Ledger
from hvdtrain.training.lesson import Lesson
from hvdtrain.training.loop import Loop
from hvdtrain.training.loop_options import LoopOptions
from hvdtrain.training.parts import put_together
from hvdtrain.training.predicting import destination
from hvdtrain.training.resume import save
from hvdtrain.training.same_call import check_same_call
from hvdtrain.training.schedules import Pacemaker
from hvdtrain.training.task import Learning, Supervised


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
        options = LoopOptions(
            precision=precision,
            channels_last=channels_last,
            accumulate=accumulate,
            clip_norm=clip_norm,
            on_nan=on_nan,
            seed=seed,
            workers=workers,
            collate=collate,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            checkpoint_minutes=checkpoint_minutes,
            checkpoint_modules=checkpoint_modules,
            checkpoint_policy=checkpoint_policy,
            compile=compile,
        )
        options.check(optimizer, replica_options, backend.name)
        self._parts = put_together(
            backend,
            model,
            optimizer,
            Lesson(task if task is not None else Supervised(loss)),  # type: ignore[arg-type]
            options,
            pacemaker=Pacemaker(schedule, schedule_interval, schedule_metric),
            callbacks=callbacks,
            checkpoints=checkpoints,
            logger=logger,
            progress=progress,
            stop_requested=stop_requested,
            replica_options=replica_options,
        )
        self.backend = backend
        self.precision, self.replica = self._parts.precision, self._parts.replica
        self.position, self.laps = self._parts.position, self._parts.laps
        self._ledger = Ledger(backend, self.position)
        self._batches: Batches | None = None  # of the last fit

    @property
    def task(self) -> Learning:
        """What is learned; another may be given between two calls, or by a callback."""
        return self._parts.lesson.task

    @task.setter
    def task(self, task: Learning) -> None:
        self._parts.lesson.give(task)

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
        plan = plan_fit(
            self._parts,
            train_data,
            eval_data,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            eval_batch_size=eval_batch_size,
            eval_every=eval_every,
            last_batch=last_batch,
            drop_last=drop_last,
            partition=partition,
            resume_from=resume_from,
        )
        earlier, self._batches = self._batches, plan.batches
        return Loop(self, self._parts, plan, self._ledger).run(earlier)

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
        parts, asked = self._parts, plan_evaluation(self._parts, data, batch_size, partition)
        inside = parts.events.inference(self)
        return parts.evaluator.metrics(
            parts.lesson.task, parts.lesson.counting, asked.source, asked.batch_size, asked.seen, inside
        )

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
        parts, source = self._parts, source_for(self._parts, data)
        if source.is_stream:
            raise ConfigError(
                "predictions come in the order of a data set with numbers, which a stream does not have; pass a list of its samples"
            )
        size = batch_size or source.batch_size or 64
        self.backend.assemble(f"a prediction after step {self.position.steps}")
        arguments = {"batch_size": size, "to": destination(to), "callbacks": parts.events.described}
        check_same_call(self.backend, "predict", arguments)
        return parts.evaluator.outputs(self.task, source, size, to, parts.events.inference(self))

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """End training as if this had been its last step, on all ranks; one rank's word is enough.

        `fit` evaluates and saves as at its planned end, and returns. After an epoch or an evaluation it ends there, within an
        epoch at the next step at which the ranks talk anyway: within about a second.

        Args:
            reason: For `FitResult.stopped`.
        """
        self._parts.events.stop_reason = reason or "a callback ended it"

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
            parts.pending_loss.look()
            save(parts.state, checkpoints, parts.position, parts.options.seed, self._batches, last=last)

        parts = self._parts
        parts.events.when_all_are_told(write)

    def keep_apart(self, checkpoints: Checkpoints) -> None:
        """Refuse a folder beside the run's own in which something else of this run writes, which would thin out its checkpoints.

        Raises:
            ConfigError: It is the run's own, or another callback's.
        """
        self._parts.events.keep_apart(checkpoints, self._parts.checkpoints)
