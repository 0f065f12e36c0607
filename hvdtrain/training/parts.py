"""What a Trainer trains with, put together once: the model as it is to be trained, on its device, and all that goes with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hvdtrain.backends.base import Backend
from hvdtrain.backends.laps import Laps
from hvdtrain.backends.replica import Replica
from hvdtrain.observe.logger import Logger, NullLogger, StepRecord
from hvdtrain.sync_batch_norm import SyncBatchNorm
from hvdtrain.training.activation_checkpointing import checkpoint_activations
from hvdtrain.training.checkpoint import Checkpoints
from hvdtrain.training.checkup import Checkup, norm_seconds
from hvdtrain.training.compiling import compile_model
from hvdtrain.training.evaluator import Evaluator
from hvdtrain.training.events import Events
from hvdtrain.training.lesson import Lesson
from hvdtrain.training.loop_options import LoopOptions
from hvdtrain.training.loop_state import LoopState
from hvdtrain.training.position import PendingLoss, Position
from hvdtrain.training.precision import Precision
from hvdtrain.training.random_numbers import OwnRandomNumbers
from hvdtrain.training.schedules import Pacemaker


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Everything that lasts as long as the Trainer.

    Attributes:
        backend: All ranks.
        options: What the loop was told.
        lesson: The task, which may change.
        replica: This rank's model and optimizer.
        precision: What steps compute with.
        pacemaker: Steps the schedule.
        events: Tells callbacks.
        position: Where training is.
        pending_loss: The last micro-batch's, counted there.
        state: What checkpoints hold.
        checkpoints: Where they are written; None for nowhere.
        checkup: When the ranks talk.
        evaluator: Asks the model without training it.
        laps: Times the phases of a step.
        own_random_numbers: This rank's.
        logger: Told of logged steps and evaluations.
        progress: Told of steps between.
        in_step: Every rank must make every other's passes, empty ones too.
    """

    backend: Backend
    options: LoopOptions
    lesson: Lesson
    replica: Replica
    precision: Precision
    pacemaker: Pacemaker
    events: Events
    position: Position
    pending_loss: PendingLoss
    state: LoopState
    checkpoints: Checkpoints | None
    checkup: Checkup
    evaluator: Evaluator
    laps: Laps
    own_random_numbers: OwnRandomNumbers
    logger: Logger
    progress: Callable[[StepRecord], None] | None
    in_step: bool


def put_together(
    backend: Backend,
    model: nn.Module,
    optimizer: Optimizer,
    lesson: Lesson,
    options: LoopOptions,
    *,
    pacemaker: Pacemaker,
    callbacks: Sequence[Any],
    checkpoints: Checkpoints | None,
    logger: Logger | None,
    progress: Callable[[StepRecord], None] | None,
    stop_requested: Callable[[], bool] | None,
    replica_options: Mapping[str, Any],
) -> Parts:
    """Check, prepare the model, and replicate it; every rank must call it with what `hvdtrain.Trainer` was given.

    Raises:
        ConfigError: Something cannot work.
        ModelMismatch: The ranks hold different models.
    """
    pacemaker.check_optimizer(optimizer)
    events = Events(callbacks)
    if checkpoints is not None:
        pacemaker.check_savable(optimizer)
        events.check_savable()
    precision = Precision(options.precision, backend.device, channels_last=options.channels_last)
    _prepare(model, optimizer, precision, options, replica_options.get("shard_modules"))
    replica: Replica = backend.replicate(model, optimizer, **replica_options)
    laps = Laps.of(replica, backend.device)
    position = Position()
    return Parts(
        backend=backend,
        options=options,
        lesson=lesson,
        replica=replica,
        precision=precision,
        pacemaker=pacemaker,
        events=events,
        position=position,
        pending_loss=PendingLoss(position, rank=backend.rank, skip_nonfinite=options.skips_nonfinite),
        state=LoopState(
            backend,
            replica,
            schedule=pacemaker.schedule,
            scaler=precision.scaler,
            callbacks=events,
            position=position,
        ),
        checkpoints=checkpoints,
        checkup=Checkup(
            backend,
            log_every=options.log_every,
            stop_requested=stop_requested or (lambda: False),
            finish_requested=lambda: bool(events.stop_reason),
            failed=(lambda: False) if checkpoints is None else checkpoints.failed,
            save_every_s=options.checkpoint_s,
            norm_s=norm_seconds(model),
        ),
        evaluator=Evaluator(backend, replica, precision, seed=options.seed),
        laps=laps,
        own_random_numbers=OwnRandomNumbers(backend),
        logger=logger or NullLogger(),
        progress=progress,
        in_step=replica.is_cut or any(isinstance(module, SyncBatchNorm) for module in model.modules()),
    )


def _prepare(
    model: nn.Module, optimizer: Optimizer, precision: Precision, options: LoopOptions, shard_modules: str | None
) -> None:
    """Let a model compute as it was asked for, in place."""
    precision.prepare(model, optimizer)
    if options.checkpoint_modules is not None:
        checkpoint_activations(model, options.checkpoint_modules, policy=options.checkpoint_policy)
    if options.compiles:
        how = {} if options.compile is True else options.compile
        compile_model(model, how, shard_modules=shard_modules)  # type: ignore[arg-type]
