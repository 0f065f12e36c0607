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
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset

from hvdtrain.backends.base import Backend
from hvdtrain.backends.replica import Replica
from hvdtrain.data.loader import empty_batch, make_loader, to_device
from hvdtrain.data.partition import BatchPartition, Step
from hvdtrain.data.samplers import EvalSampler, PartitionSampler
from hvdtrain.data.shared_memory import check_shared_memory
from hvdtrain.errors import CheckpointError, ConfigError, NonFiniteLoss, Preempted
from hvdtrain.observe.logger import EvalRecord, Logger, NullLogger, StepRecord
from hvdtrain.sync_batch_norm import SyncBatchNorm
from hvdtrain.training.checkpoint import Checkpoints, load
from hvdtrain.training.checkup import Checkup, Tally
from hvdtrain.training.position import Position
from hvdtrain.training.precision import Precision
from hvdtrain.training.state import random_state, same_random_numbers, set_random_state
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

    Args:
        backend: A running backend.
        model: Moved to the backend's device and the precision's type unless the optimizer already holds its parameters
            there; built the same way on every rank.
        optimizer: Over the model's parameters. Make it after moving the model to `backend.device`.
        loss: ``loss(model(x), y)`` for data of ``(x, y)``, a mean over samples; or give ``task``.
        task: What to learn (see `Learning`), for anything else.
        schedule: A torch scheduler over the optimizer.
        schedule_interval: "step" to step it after every optimizer step, "epoch" after every epoch (a ReduceLROnPlateau
            is always stepped after an evaluation, with its loss).
        precision: "fp32", "fp64", "bf16" or "fp16".
        accumulate: Micro-batches per optimizer step and rank.
        clip_norm: Largest L2 norm of the averaged gradient.
        on_nan: "stop" all ranks at a NaN or infinite loss, or "skip" the step on all ranks.
        seed: Of the order of the samples and of augmentation in loader processes.
        workers: Loader processes per rank.
        collate: As for `torch.utils.data.DataLoader`.
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
        if schedule_interval not in ("step", "epoch"):
            raise ConfigError(f"schedule_interval must be 'step' or 'epoch', got {schedule_interval!r}")
        self.backend = backend
        self.precision = Precision(precision, backend.device)
        self.precision.prepare(model)
        self.replica: Replica = backend.replicate(model, optimizer, **replica_options)
        self.task: Learning = task if task is not None else Supervised(loss)  # type: ignore[arg-type]
        self.position = Position()
        self._schedule = schedule
        self._schedule_interval = schedule_interval
        self._accumulate = accumulate
        self._clip_norm = clip_norm
        self._skip_nonfinite = on_nan == "skip"
        self._seed = seed
        self._workers = workers
        self._collate = collate
        self._logger: Logger = logger or NullLogger()
        self._checkpoints = checkpoints
        self._checkpoint_every = checkpoint_every
        self._checkup = Checkup(backend, log_every=log_every, stop_requested=stop_requested or (lambda: False))
        self._pending_loss: tuple[int, Tensor, int] | None = None  # step, loss, samples: not yet looked at (GPU)
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
        resume_from: str | None = None,
    ) -> FitResult:
        """Train for some epochs; every rank must call it with the same arguments.

        Args:
            train_data: With ``__len__`` and ``__getitem__``; the same on every rank.
            eval_data: Likewise; evaluated every ``eval_every`` epochs and at the end.
            epochs: Passes over the data, those before a resume included.
            max_steps: End after so many optimizer steps, if that is earlier.
            batch_size: Samples per rank and micro-batch; or
            global_batch_size: samples per optimizer step over all ranks, which gives the same training for every world
                size. A rank's share may differ by one sample.
            eval_batch_size: Samples per rank and batch of an evaluation.
            eval_every: Epochs between evaluations.
            resume_from: A checkpoint folder to continue from.

        Raises:
            NonFiniteLoss: The loss became NaN or infinite (unless ``on_nan="skip"``).
            Preempted: Some rank was asked to stop; a checkpoint has been saved, if there is a place for it.
        """
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
        total_steps = min(epochs * partition.steps_per_epoch, max_steps or math.inf)
        eval_batch_size = eval_batch_size or max(1, math.ceil(partition.global_batch_size / self.backend.world_size))
        if resume_from is not None:
            self._resume(resume_from, partition)
            if self.position.steps < total_steps:
                self._rehearse(loader, sampler, partition)
        self._checkup.begin(self.position.steps)
        position, metrics = self.position, dict(self.position.eval_metrics)
        while position.epoch < epochs and position.steps < total_steps:
            self._train_epoch(loader, sampler, partition, int(total_steps))
            self._finish_epoch_schedule()
            ended = position.epoch >= epochs or position.steps >= total_steps
            if eval_data is not None and (ended or position.epoch % eval_every == 0):
                metrics = self.evaluate(eval_data, batch_size=eval_batch_size)
                position.eval_metrics = metrics
                self._logger.log_eval(EvalRecord(step=position.steps, epoch=position.epoch, metrics=metrics))
                if isinstance(self._schedule, ReduceLROnPlateau):
                    self._schedule.step(metrics["loss"])
            self._save()
            self._stop_if_asked()
        return FitResult(
            epochs=position.epoch,
            steps=position.steps,
            skipped_steps=position.skipped_steps,
            train_loss=position.train_loss,
            eval_metrics=metrics,
            samples=self._samples,
            train_seconds=self._train_seconds,
            resumed_from=resume_from,
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
        self._look_at_pending_loss()
        whole = self.backend.all_reduce(
            torch.tensor([position.epoch_tally.loss_sum, float(position.epoch_tally.samples)], dtype=torch.float64)
        ).tolist()
        position.train_loss = Tally(whole[0], int(whole[1])).mean
        if position.samples >= partition.length:
            position.finish_epoch()

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
                if samples:
                    self._note_loss(loss, samples)
                replica.backward(precision.scale(loss), samples=samples, total=step.samples)
        result = replica.step(clip_norm=self._clip_norm, scaler=precision.scaler, skip_nonfinite=self._skip_nonfinite)
        if result.skipped:
            self.position.skipped_steps += 1
            _log.info("step %d: the gradient is not finite; no update on any rank", self.position.steps)
        elif self._schedule is not None and self._schedule_interval == "step":
            self._schedule.step()
        self._gradient_norm = result.gradient_norm

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, data: Dataset[Any], *, batch_size: int = 64) -> dict[str, float]:
        """Compute the task's metrics over a data set, each sample once; every rank must call it.

        Args:
            data: With ``__len__`` and ``__getitem__``; the same on every rank.
            batch_size: Samples per rank and batch.

        Returns:
            Each metric's mean over all samples, the same on every rank.

        Raises:
            ConfigError: The data set is empty.
        """
        length = len(data)  # type: ignore[arg-type]
        if length == 0:
            raise ConfigError("the evaluation data set is empty; give one with samples, or none")
        backend, replica = self.backend, self.replica
        sampler = EvalSampler(length, batch_size=batch_size, world_size=backend.world_size, rank=backend.rank)
        replica.sync_buffers()
        model = replica.inference_model
        was_training = model.training
        model.eval()
        sums: dict[str, Tensor] = {}
        for indices, batch in zip(sampler, self._loader(data, sampler), strict=True):
            batch = self.precision.cast(to_device(batch, backend.device, non_blocking=True))  # noqa: PLW2901
            with self.precision.autocast():
                found = self.task.metrics(model, batch)
            for name, value in found.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=backend.device)) + (
                    value.detach().double() * len(indices)
                )
        model.train(was_training)
        # Rank 0 has a sample if anybody has, so it knows the names; a rank without samples adds zeros.
        names: list[str] = backend.broadcast_object(sorted(sums))
        zero = torch.zeros((), dtype=torch.float64, device=backend.device)
        totals = backend.all_reduce(torch.stack([sums.get(name, zero) for name in names]))
        return dict(zip(names, (totals / length).tolist(), strict=True))

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

    def _note_loss(self, loss: Tensor, samples: int) -> None:
        """Count a micro-batch's loss. On a GPU it is looked at one micro-batch later, when it is there anyway."""
        detached = loss.detach()
        if detached.numel() != 1:
            raise ConfigError(
                f"the loss must be a scalar, the mean over the batch's samples; got shape {tuple(detached.shape)}"
            )
        self._look_at_pending_loss()
        self._pending_loss = (self.position.steps, detached, samples)
        if detached.device.type == "cpu":
            self._look_at_pending_loss()

    def _look_at_pending_loss(self) -> None:
        if self._pending_loss is None:
            return
        step, loss, samples = self._pending_loss
        self._pending_loss = None
        value = float(loss)
        if math.isfinite(value):
            self.position.count(value, samples)
        elif not self._skip_nonfinite:
            raise NonFiniteLoss(
                f"the loss is {value} at step {step + 1} (epoch {self.position.epoch + 1}) on rank {self.backend.rank}. Lower --lr, "
                "clip with --clip-norm, look for broken samples, or go on without such steps with --on-nan skip"
            )

    def _hold_checkup(self, total_steps: int) -> None:
        self._look_at_pending_loss()
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
                    lr=float(self.replica.optimizer.param_groups[0]["lr"]),
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

    def _finish_epoch_schedule(self) -> None:
        plateau = isinstance(self._schedule, ReduceLROnPlateau)
        if self._schedule is not None and self._schedule_interval == "epoch" and not plateau:
            self._schedule.step()

    # -- saving and resuming ------------------------------------------------------------------------------------------

    def _save(self) -> str | None:
        if self._checkpoints is None:
            return None
        self._look_at_pending_loss()
        position, replica = self.position, self.replica
        tally = position.epoch_tally
        return self._checkpoints.save(
            self.backend,
            step=position.steps,
            model=replica.module.state_dict(),
            training={
                "optimizer": replica.optimizer.state_dict(),
                "schedule": None if self._schedule is None else _plain(self._schedule.state_dict()),
                "precision": self.precision.state_dict(),
                "position": position.state_dict(),
                "seed": self._seed,
            },
            rank_state={"random": random_state(), "tally": [tally.loss_sum, tally.samples]},
        )

    def _resume(self, path: str, partition: BatchPartition) -> None:
        """Continue from a checkpoint: exactly on as many ranks as it was written by, else with the same global batches."""
        backend, replica = self.backend, self.replica
        loaded = load(backend, path, replica.module)
        if loaded is None:
            raise CheckpointError(f"rank 0 was given no checkpoint to resume from, rank {backend.rank} {path}")
        training = loaded.training
        if training["seed"] != self._seed:
            _log.warning("the checkpoint was written with --seed %s, this run has %s", training["seed"], self._seed)
        try:
            replica.optimizer.load_state_dict(training["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{path} was written with another optimizer: {error}; use the same, or --resume never"
            ) from error
        if self._schedule is not None and training["schedule"] is not None:
            self._schedule.load_state_dict(training["schedule"])
        self.precision.load_state_dict(training["precision"])
        replica.copy_from_rank_zero()
        states = loaded.rank_states
        if len(states) == backend.world_size:
            set_random_state(states[backend.rank]["random"])
            tally = Tally(*states[backend.rank]["tally"])
        else:
            _log.info(
                "the checkpoint is of %d ranks, this run has %d: random numbers begin anew",
                len(states),
                backend.world_size,
            )
            sums = [state["tally"] for state in states] if backend.rank == 0 else []
            tally = Tally(sum(s[0] for s in sums), sum(s[1] for s in sums))
        self.position.load_state_dict(training["position"], tally)
        if self.position.samples % partition.global_batch_size:
            raise CheckpointError(
                f"{path} stopped after {self.position.samples} samples of an epoch, which is no whole number of global batches of "
                f"{partition.global_batch_size}; resume with the global batch size it was written with"
            )

    def _rehearse(self, loader: DataLoader[Any], sampler: PartitionSampler, partition: BatchPartition) -> None:
        """Run one forward and backward pass for the engine's sake, and leave everything as it was."""
        step = partition.step(0)
        if not step.every_rank:
            return
        module = self.replica.module
        module.train()
        buffers = [buffer.clone() for buffer in module.buffers()]
        with same_random_numbers():
            sampler.set_position(0)
            batch = self.precision.cast(to_device(next(iter(loader)), self.backend.device))

            def forward(model: nn.Module) -> Tensor:
                with self.precision.autocast():
                    return self.task.loss(model, batch)

            self.replica.rehearse(forward)
        with torch.no_grad():
            for buffer, before in zip(module.buffers(), buffers, strict=True):
                buffer.copy_(before)


def _plain(value: Any) -> Any:
    """A scheduler's state without what cannot be read back without unpickling (functions, which become None)."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, Tensor, type(None))) else None
