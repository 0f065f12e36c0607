"""What a run steps its model with: the optimizer and its schedule, and in how many steps of which size."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hvdtrain.backends.base import Backend
from hvdtrain.data.partition import BatchPartition
from hvdtrain.data.source import source_of
from hvdtrain.errors import ConfigError
from hvdtrain.optim.master_weights import MasterWeights, has_masters
from hvdtrain.optim.schedule import make_schedule, scaled_lr
from hvdtrain.optim.sharded import ShardedOptimizer
from hvdtrain.settings.components import resolve
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.options import Component
from hvdtrain.training.dry_run import check_optimizer, check_schedule
from hvdtrain.training.task import Task


def steps_per_epoch(config: TrainConfig, data: Any, batch: int, backend: Backend) -> int | None:
    """Steps in an epoch; None with a stream, of which nobody knows."""
    source = source_of(data)
    if source.is_stream:
        return None
    samples = source.length
    if config.partition == "sample-own":
        samples = sum(backend.all_gather_object(samples))
    return BatchPartition(length=samples, global_batch_size=batch, last_batch=config.last_batch).steps_per_epoch


def global_batch_size(config: TrainConfig, backend: Backend) -> int:
    """Samples per step over all ranks."""
    if config.global_batch_size is not None:
        return config.global_batch_size
    assert config.batch_size is not None
    return config.batch_size * config.accumulate * backend.world_size


def optimizer_of(config: TrainConfig, task: Task, model: nn.Module, backend: Backend) -> Optimizer:
    """The optimizer, around it float32 masters where parameters are of 16 bits, and around these what spreads states."""
    optimizer = _inner_optimizer(config, task, model, backend)
    if config.precision == "bf16-pure" and not has_masters(optimizer):
        optimizer = MasterWeights(optimizer)
    return ShardedOptimizer(optimizer, backend) if config.shard_optimizer else optimizer


def _inner_optimizer(config: TrainConfig, task: Task, model: nn.Module, backend: Backend) -> Optimizer:
    build = getattr(task, "build_optimizer", None)
    if build is not None:
        unset = TrainConfig()
        beside = [name for name in ("optimizer", "lr", "scale_lr") if getattr(config, name) != getattr(unset, name)]
        if beside:
            raise ConfigError(
                f"{type(task).__name__}.build_optimizer makes the optimizer, so --{beside[0].replace('_', '-')} would have no "
                "effect; leave one of them out"
            )
        optimizer = build(model)
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"{type(task).__name__}.build_optimizer made a {type(optimizer).__name__}, not a torch optimizer"
            )
        return optimizer
    make = resolve(config.optimizer, where=("torch.optim",), flag="--optimizer", provided=("params", "lr"))
    lr = scaled_lr(config.lr, backend.world_size) if config.scale_lr else config.lr
    if getattr(make.target, "__module__", "").startswith("torch.optim"):
        check_optimizer(make, lr, name=config.optimizer.name, device=backend.device)
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=lr)
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"--optimizer {config.optimizer.name} made a {type(optimizer).__name__}, not a torch optimizer"
        )
    return optimizer


def schedule_of(
    config: TrainConfig, optimizer: Optimizer, backend: Backend, steps_per_epoch: int | None
) -> tuple[LRScheduler, str]:
    """The schedule, and what steps it: "step" or "epoch".

    Args:
        config: What is asked for.
        optimizer: Whose learning rate it sets.
        backend: All ranks.
        steps_per_epoch: None where nobody knows.

    Raises:
        ConfigError: Its values cannot work, or what it needs to know of the run is not known.
    """
    if config.schedule.is_path:
        if config.warmup_epochs or config.warmup_steps:
            flag = "--warmup-steps" if config.warmup_steps else "--warmup-epochs"
            raise ConfigError(f"{flag} goes with the built-in schedules, not with --schedule {config.schedule.name}")
        args = dict(config.schedule.args)
        interval = str(args.pop("interval", "epoch"))  # torch's schedulers count epochs unless told otherwise
        make = resolve(Component(config.schedule.name, args), flag="--schedule", provided=("optimizer",))
        if make.path.startswith("torch.optim.lr_scheduler.") and len(optimizer.param_groups) == 1:
            check_schedule(make, name=config.schedule.name)
        schedule = make(optimizer)
        if not isinstance(schedule, LRScheduler):
            raise ConfigError(
                f"--schedule {config.schedule.name} made a {type(schedule).__name__}, not one of torch's schedulers"
            )
        return schedule, interval
    if steps_per_epoch is None:
        _check_without_length(config)
        steps_per_epoch = config.max_steps or 1  # what needs more than a schedule by steps is refused
    total = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)
    warmup_steps = round(config.warmup_epochs * steps_per_epoch) if config.warmup_steps is None else config.warmup_steps
    if config.epochs and (config.warmup_steps or 0) > total:
        raise ConfigError(
            f"--warmup-steps {config.warmup_steps} is more than the {total} steps of this run ({steps_per_epoch} an epoch); "
            "the learning rate would never be reached"
        )
    schedule = make_schedule(
        optimizer,
        config.schedule.name,
        config.schedule.args,
        total_steps=int(total),
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_steps,
        warmup_start=1 / backend.world_size if config.scale_lr else 0.0,
    )
    return schedule, "step"


def _check_without_length(config: TrainConfig) -> None:
    """Refuse schedules over epochs of which nobody knows the length."""
    name = config.schedule.name
    if config.warmup_epochs:
        problem = f"--warmup-epochs {config.warmup_epochs:g} cannot be counted in steps; give --warmup-steps"
    elif name == "step":
        problem = (
            "--schedule step, which counts epochs in steps, does not go with it; give --schedule "
            "torch.optim.lr_scheduler.StepLR --schedule.step_size EPOCHS"
        )
    elif name != "constant" and config.max_steps is None:
        problem = f"--schedule {name} needs the run's end; give --max-steps, or --schedule constant"
    else:
        return
    raise ConfigError(f"the training data are a stream, of unknown length: {problem}")
