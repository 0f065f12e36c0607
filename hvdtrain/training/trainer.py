"""The training loop, and nothing else: fetch, forward, backward, exchange, step, log; evaluate; save.

Which engine moves the gradients is the backend's business, what is learned the task's, how numbers are written down the
logger's. The loop promises that every sample counts once: whatever the number of ranks, the length of the data or the
batch size, a step follows the gradient of the mean loss over the global batch, and an evaluation is the mean over all
samples.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from hvdtrain.backends.base import Backend
from hvdtrain.backends.replica import Replica
from hvdtrain.data.loader import empty_batch, make_loader, to_device
from hvdtrain.data.partition import BatchPartition, Step
from hvdtrain.data.samplers import EvalSampler, PartitionSampler
from hvdtrain.data.shared_memory import check_shared_memory
from hvdtrain.errors import ConfigError, Preempted
from hvdtrain.observe.logger import EvalRecord, Logger, NullLogger, StepRecord
from hvdtrain.sync_batch_norm import SyncBatchNorm
from hvdtrain.training.checkpoint import Checkpoints, Saved
from hvdtrain.training.checkup import Checkup, Tally
from hvdtrain.training.evaluation import evaluate
from hvdtrain.training.loop_state import LoopState, rehearse
from hvdtrain.training.position import PendingLoss, Position, check_loss
from hvdtrain.training.precision import Precision
from hvdtrain.training.random_numbers import OwnRandomNumbers, same_random_numbers
from hvdtrain.training.resume import resume, save
from hvdtrain.training.schedules import Pacemaker
from hvdtrain.training.task import Learning, Supervised

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """What a `Trainer.fit` did, the same on every rank.

    Attributes:
        epochs: Epochs completed, those before a resume included.
        steps: Optimizer steps, those before a resume included; skipped ones count.
        skipped_steps: Steps without an update, because the gradient was not finite.
        train_loss: Mean over the samples of the last epoch (or part of one) that was trained.
        eval_metrics: Of the last evaluation; empty without one.
        samples: Samples trained on in this call.
        train_seconds: Time spent in training steps, without evaluation and checkpoints.
        resumed_from: The checkpoint that this call continued from, or None.
    """

    epochs: int
    steps: int
    skipped_steps: int
    train_loss: float
    eval_metrics: dict[str, float] = field(default_factory=dict)
    samples: int
    train_seconds: float
    resumed_from: str | None


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
            stepped after every evaluation instead, with its loss, but for one that is made only because the run ends.
        precision: "fp32", "fp64", "bf16" or "fp16".
        accumulate: Micro-batches per optimizer step and rank.
        clip_norm: Largest L2 norm of the averaged gradient.
        on_nan: "stop" all ranks at a NaN or infinite loss, or "skip" the step on all ranks.
        seed: Of the order of the samples and of augmentation in loader processes.
        workers: Loader processes per rank.
        collate: As for `torch.utils.data.DataLoader`; the task's own `collate`, if it has one, unless given.
        logger: Told of steps and evaluations, as plain numbers.
        log_every: Steps between logged steps.
        checkpoints: Where to save; nothing is saved without.
        checkpoint_every: Steps between checkpoints, besides the one after each epoch; 0 for none besides.
        stop_requested: Asked about once a second; when it is true on any rank, all save and raise `Preempted`.
        replica_options: For `Backend.replicate`, such as ``find_unused_parameters=True``.

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
        precision: str = "fp32",
        accumulate: int = 1,
        clip_norm: float | None = None,
        on_nan: str = "stop",
        seed: int = 0,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        logger: Logger | None = None,
        log_every: int = 10,
        checkpoints: Checkpoints | None = None,
        checkpoint_every: int = 0,
        stop_requested: Callable[[], bool] | None = None,
        **replica_options: Any,
    ) -> None:
        if (loss is None) == (task is None):
            raise ConfigError("give the Trainer either loss= (for data of (x, y)) or task=")
        if isinstance(optimizer, LBFGS):
            raise ConfigError(
                "LBFGS evaluates the loss several times a step, which this loop does not; choose another optimizer"
            )
        for name, value in (("accumulate", accumulate), ("log_every", log_every)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if on_nan not in ("stop", "skip"):
            raise ConfigError(f"on_nan must be 'stop' or 'skip', got {on_nan!r}")
        self._pacemaker = Pacemaker(schedule, schedule_interval)
        if checkpoints is not None:
            self._pacemaker.check_savable(optimizer)
        self.backend = backend
        self.precision = Precision(precision, backend.device)
        self.precision.prepare(model)
        self.replica: Replica = backend.replicate(model, optimizer, **replica_options)
        self.task: Learning = task if task is not None else Supervised(loss)  # type: ignore[arg-type]
        self.position = Position()
        self._state = LoopState(
            backend, self.replica, schedule=schedule, scaler=self.precision.scaler, position=self.position
        )
        self._own_random_numbers = OwnRandomNumbers(backend)
        self._accumulate = accumulate
        self._clip_norm = clip_norm
        self._skip_nonfinite = on_nan == "skip"
        self._seed = seed
        self._workers = workers
        self._collate = collate or getattr(task, "collate", None)
        self._logger: Logger = logger or NullLogger()
        self._checkpoints = checkpoints
        self._checkpoint_every = checkpoint_every
        self._checkup = Checkup(backend, log_every=log_every, stop_requested=stop_requested or (lambda: False))
        self._pending_loss = PendingLoss(self.position, rank=backend.rank, skip_nonfinite=self._skip_nonfinite)
        self._lr: float | Tensor = math.nan  # of the last step
        self._gradient_norm: Tensor | None = None
        self._in_step = any(isinstance(module, SyncBatchNorm) for module in model.modules())  # every rank's every pass
        self._empty_batch: Any = None
        self._train_seconds = 0.0
        self._samples = 0

    # -- training -----------------------------------------------------------------------------------------------------

    def fit(
        self,
        train_data: Dataset[Any],
        eval_data: Dataset[Any] | None = None,
        *,
        epochs: int = 1,
        max_steps: int | None = None,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        eval_every: int = 1,
        resume_from: Saved | Path | str | None = None,
    ) -> FitResult:
        """Train for some epochs; every rank must call it with the same arguments.

        Args:
            train_data: With ``__len__`` and ``__getitem__``; the same on every rank.
            eval_data: Likewise; evaluated every ``eval_every`` epochs and at the end.
            epochs: Passes over the data, those before a resume included; 0 to evaluate only.
            max_steps: End after so many optimizer steps, if that is earlier.
            batch_size: Samples per rank and micro-batch; or
            global_batch_size: samples per optimizer step over all ranks, which gives the same training for every world
                size. A rank's share may differ by one sample.
            eval_batch_size: Samples per rank and batch of an evaluation.
            eval_every: Epochs between evaluations.
            resume_from: A checkpoint to continue from: its folder, or what `Checkpoints.find` returned.

        Raises:
            ConfigError: An argument cannot work; the schedule needs evaluations, and there is no evaluation data.
            CheckpointError: The checkpoint cannot be continued from.
            NonFiniteLoss: The loss became NaN or infinite (unless ``on_nan="skip"``).
            Preempted: Some rank was asked to stop; a checkpoint has been saved, if there is a place for it.
        """
        if epochs < 0:
            raise ConfigError(f"epochs must be 0 or more, got {epochs}")
        self._pacemaker.check_evaluated(epochs == 0 or eval_data is not None)
        partition = self._partition(train_data, batch_size, global_batch_size)
        topology = self.backend.topology
        check_shared_memory(
            train_data,
            batch_size=-(-partition.global_batch_size // (topology.world_size * self._accumulate)),
            workers=self._workers,
            ranks=topology.local_world_size,
        )
        sampler = PartitionSampler(partition, shuffle=True, seed=self._seed)
        loader = self._loader(train_data, sampler)
        if self._in_step:
            with same_random_numbers():
                self._empty_batch = empty_batch(train_data, self._collate)
        eval_batch_size = eval_batch_size or max(1, math.ceil(partition.global_batch_size / self.backend.world_size))
        total_steps = min(epochs * partition.steps_per_epoch, math.inf if max_steps is None else max_steps)
        position, resumed_from = self.position, None
        with self._own_random_numbers:
            if resume_from is not None:
                resumed_from = self._resume(resume_from, loader, sampler, total_steps)
            self._checkup.begin(position.steps)
            while not position.has_ended(epochs, total_steps, partition.length):
                self._train_epoch(loader, sampler, partition, int(total_steps))
                regular = position.samples == 0 and position.epoch % eval_every == 0
                if eval_data is not None and (regular or position.has_ended(epochs, total_steps, partition.length)):
                    self._evaluate(eval_data, eval_batch_size)
                    if regular:
                        self._pacemaker.after_evaluation(position.eval_metrics)
                self._save()
                self._stop_if_asked()
            if eval_data is not None and (epochs == 0 or position.evaluated_at < position.steps):
                self._evaluate(eval_data, eval_batch_size)
        return FitResult(
            epochs=position.epoch,
            steps=position.steps,
            skipped_steps=position.skipped_steps,
            train_loss=position.train_loss,
            eval_metrics=dict(position.eval_metrics),
            samples=self._samples,
            train_seconds=self._train_seconds,
            resumed_from=resumed_from,
        )

    def _train_epoch(
        self, loader: DataLoader[Any], sampler: PartitionSampler, partition: BatchPartition, total_steps: int
    ) -> None:
        position = self.position
        self.replica.module.train()
        sampler.set_position(position.epoch, position.samples)
        batches = iter(loader)
        for step in partition.steps(position.samples):
            began = time.perf_counter()
            self._train_step(step, batches)
            position.advance(step.samples)
            self._train_seconds += time.perf_counter() - began
            self._samples += step.samples
            if self._checkup.due(position.steps):
                self._hold_checkup(total_steps)
            if self._checkpoint_every and position.steps % self._checkpoint_every == 0:
                self._save()
            if position.steps >= total_steps and position.samples < partition.length:
                break
        self._pending_loss.look()
        whole = self.backend.all_reduce(
            torch.tensor([position.epoch_tally.loss_sum, float(position.epoch_tally.samples)], dtype=torch.float64)
        ).tolist()
        position.train_loss = Tally(whole[0], int(whole[1])).mean
        if position.samples >= partition.length:
            position.finish_epoch()
            self._pacemaker.after_epoch()

    def _train_step(self, step: Step, batches: Iterator[Any]) -> None:
        """One global batch; also on a rank whose share of it is empty."""
        replica, precision = self.replica, self.precision
        micro_batches = self._micro_batches(step)
        for number, samples in enumerate(micro_batches, 1):
            batch = next(batches) if samples else self._empty_batch
            batch = precision.cast(to_device(batch, self.backend.device, non_blocking=True))
            with replica.accumulate(last=number == len(micro_batches)):
                with precision.autocast():
                    loss = self.task.loss(replica.model, batch)
                check_loss(loss)
                if samples:
                    self._pending_loss.note(loss, samples)
                replica.backward(precision.scale(loss), samples=samples, total=step.samples)
        lr = replica.optimizer.param_groups[0]["lr"]
        self._lr = lr.clone() if isinstance(lr, Tensor) else lr  # a schedule writes into a tensor
        result = replica.step(clip_norm=self._clip_norm, scaler=precision.scaler, skip_nonfinite=self._skip_nonfinite)
        if result.skipped:
            self.position.skipped_steps += 1
            _log.info("step %d: the gradient is not finite; no update on any rank", self.position.steps)
        else:
            self._pacemaker.after_step()
        self._gradient_norm = result.gradient_norm

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, data: Dataset[Any], *, batch_size: int = 64) -> dict[str, float]:
        """Compute the task's metrics over a data set, each sample once; every rank must call it.

        Args:
            data: With ``__len__`` and ``__getitem__``; the same on every rank.
            batch_size: Samples per rank and batch.

        Returns:
            Each metric's mean over all samples, the same on every rank.

        Raises:
            ConfigError: The data set is empty, or what the task's `metrics` returned cannot be averaged; the message names
                the metric.
            CollectiveError: Some rank did not call it; says which, and what it does.
        """
        length = len(data)  # type: ignore[arg-type]
        if length == 0:
            raise ConfigError("the evaluation data set is empty; give one with samples, or none")
        backend = self.backend
        backend.assemble(f"an evaluation of {length} samples after step {self.position.steps}")
        sampler = EvalSampler(length, batch_size=batch_size, world_size=backend.world_size, rank=backend.rank)
        batches = zip(map(len, sampler), self._loader(data, sampler), strict=True)
        return evaluate(backend, self.replica, self.task, self.precision, batches)

    def _evaluate(self, data: Dataset[Any], batch_size: int) -> None:
        position = self.position
        position.eval_metrics = self.evaluate(data, batch_size=batch_size)
        position.evaluated_at = position.steps
        self._logger.log_eval(EvalRecord(step=position.steps, epoch=position.epoch, metrics=position.eval_metrics))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _partition(self, data: Dataset[Any], batch_size: int | None, global_batch_size: int | None) -> BatchPartition:
        if (batch_size is None) == (global_batch_size is None):
            raise ConfigError("give either batch_size (per rank and micro-batch) or global_batch_size")
        backend = self.backend
        return BatchPartition(
            length=len(data),  # type: ignore[arg-type]
            global_batch_size=global_batch_size or (batch_size or 0) * backend.world_size * self._accumulate,
            world_size=backend.world_size,
            rank=backend.rank,
            accumulate=self._accumulate,
        )

    def _loader(self, data: Dataset[Any], sampler: Any) -> DataLoader[Any]:
        return make_loader(
            data,
            sampler,
            workers=self._workers,
            pin_memory=self.backend.device.type == "cuda",
            seed=self._seed,
            timeout_s=self.backend.timeout_s if self._workers else 0,
            collate=self._collate,
        )

    def _micro_batches(self, step: Step) -> list[int]:
        """How many samples each of this rank's micro-batches has; with empty ones if the model needs ranks in step."""
        sizes = [len(positions) for positions in step.micro_batches]
        return sizes + [0] * (step.passes - len(sizes)) if self._in_step else sizes

    def _hold_checkup(self, total_steps: int) -> None:
        self._pending_loss.look()
        position = self.position
        verdict = self._checkup.hold(position.steps, position.take_recent())
        if self._checkup.logs(position.steps):
            rate = self._samples / self._train_seconds if self._train_seconds else math.nan
            self._logger.log_step(
                StepRecord(
                    step=position.steps,
                    total_steps=total_steps,
                    epoch=position.epoch,
                    loss=verdict.tally.mean,
                    lr=float(self._lr),
                    samples_per_second=rate,
                    gradient_norm=None if self._gradient_norm is None else float(self._gradient_norm),
                )
            )
        if verdict.stop:
            self._stop()

    def _stop_if_asked(self) -> None:
        """After an evaluation, which may have been long."""
        if self._checkup.hold(self.position.steps, Tally()).stop:
            self._stop()

    def _stop(self) -> None:
        path = self._save()
        where = f"saved {path}" if path else "nothing was saved, because there is no place for checkpoints"
        raise Preempted(f"asked to stop after step {self.position.steps}; {where}")

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def _save(self) -> str | None:
        if self._checkpoints is None:
            return None
        self._pending_loss.look()
        return save(self._state, self._checkpoints, self.position, self._seed)

    def _resume(
        self, which: Saved | Path | str, loader: DataLoader[Any], sampler: PartitionSampler, total_steps: float
    ) -> str:
        partition = sampler.partition
        path = resume(self._state, which, self.position, self._seed, self.backend, partition)
        if self.position.steps < total_steps and partition.step(0).every_rank:
            with same_random_numbers():
                sampler.set_position(0)
                batch = self.precision.cast(to_device(next(iter(loader)), self.backend.device))

            def forward(model: nn.Module) -> Tensor:
                with self.precision.autocast():
                    return self.task.loss(model, batch)

            rehearse(self.replica, forward)
        return path
