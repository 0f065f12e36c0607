"""One training run out of one configuration: the only module that knows both the configuration and the parts."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hvdtrain import backends
from hvdtrain.backends.base import Backend
from hvdtrain.backends.exclusions import ASKED_BY, check_combination
from hvdtrain.backends.recommended import asked_for, measured_otherwise, read_recommendation
from hvdtrain.backends.replica import Replica
from hvdtrain.backends.units import whole
from hvdtrain.backends.watched import without_compile
from hvdtrain.data.named import NamedData, load_data
from hvdtrain.data.partition import BatchPartition
from hvdtrain.data.source import source_of
from hvdtrain.errors import ConfigError
from hvdtrain.launch.detect import detect
from hvdtrain.launch.launchers import may_join_by_mpi
from hvdtrain.observe import run_folder, trackers
from hvdtrain.observe.console import LastingConsole
from hvdtrain.observe.jsonl import JsonlLogger
from hvdtrain.observe.logger import FanOut, Logger, NullLogger, StepRecord
from hvdtrain.observe.progress import ProgressLogger
from hvdtrain.observe.summary import Summary, parameters_norm, parameters_sha256, show_summary, write_summary
from hvdtrain.observe.surroundings import place_of, surroundings
from hvdtrain.observe.whole_file import write_whole
from hvdtrain.optim.master_weights import MasterWeights, has_masters
from hvdtrain.optim.schedule import make_schedule, scaled_lr
from hvdtrain.optim.sharded import ShardedOptimizer
from hvdtrain.profiling.profiler import Profiler
from hvdtrain.settings.components import resolve
from hvdtrain.settings.config import HorovodConfig, TrainConfig
from hvdtrain.settings.horovod_config import DYNAMIC_TIMELINE
from hvdtrain.settings.layers import plain
from hvdtrain.settings.options import Component
from hvdtrain.settings.profiling import steps_of
from hvdtrain.settings.record import record_text, what_stays
from hvdtrain.settings.resuming import compare, recorded
from hvdtrain.sync_batch_norm import convert_sync_batch_norm
from hvdtrain.training import models
from hvdtrain.training.async_checkpoints import AsyncCheckpoints
from hvdtrain.training.checkpoint import Checkpoints, agree, model_state, opened
from hvdtrain.training.checkpoint_files import Saved, name_of
from hvdtrain.training.dry_run import check_model, check_optimizer, check_schedule
from hvdtrain.training.interrupt import Interrupt
from hvdtrain.training.ledger import FitResult
from hvdtrain.training.mirror import Mirror
from hvdtrain.training.precision import lie_channels_last
from hvdtrain.training.random_numbers import seed_everything
from hvdtrain.training.stopping import StopRequest
from hvdtrain.training.task import Classification, Task
from hvdtrain.training.trainer import Trainer
from hvdtrain.version import __version__

_log = logging.getLogger(__name__)


def run_training(config: TrainConfig) -> Summary:
    """Train as configured, on this rank.

    Returns:
        The summary, the same on every rank. Rank 0 has shown it and written it, unless there was nothing left to train:
        then the folder keeps what the run that trained has written.

    Raises:
        HvdtrainError: See `hvdtrain.errors`.
    """
    began = time.monotonic()
    if config.deterministic:
        _be_deterministic()
    if config.profile is not None:
        os.environ.setdefault(
            "KINETO_LOG_LEVEL", "6"
        )  # it tells of every start and stop, and of GPUs that are not there
    with StopRequest() as stop, _backend(config) as backend:
        _check_combination(config, backend)
        console = _console(backend)
        console.print(_headline(backend), highlight=False)
        _say_recommendation(config, console)
        run_dir = Path(backend.broadcast_object(str(run_folder.choose(config.run_dir)) if backend.rank == 0 else ""))
        seed_everything(config.seed)  # alike on every rank: so are the models, whatever the world size
        task = _task(config, backend)
        model, train_data, eval_data = task.build_model(), task.train_data(), task.eval_data()
        _check_model(config, task, model, backend)
        if config.sync_batch_norm:
            model = convert_sync_batch_norm(model, backend)
        if config.channels_last:
            lie_channels_last(model)  # before an optimizer's state lies as the model does
        batch = _global_batch_size(config, backend)
        steps_per_epoch = _steps_per_epoch(config, train_data, batch, backend)
        if config.epochs == 0 and eval_data is None:
            raise ConfigError("--epochs 0 only evaluates, and there are no evaluation data; train for some --epochs")
        optimizer = _optimizer(config, task, model, backend)
        if config.precision == "bf16-pure" and not has_masters(optimizer):
            optimizer = MasterWeights(optimizer)
        if config.shard_optimizer:
            optimizer = ShardedOptimizer(optimizer, backend)
        schedule, interval = _schedule(config, optimizer, backend, steps_per_epoch)
        checkpoints = _checkpoints(config, backend, run_dir)
        resume_from = agree(backend, lambda: _begin(config, backend, run_dir, checkpoints, console))
        environment = surroundings(
            backend.all_gather_object(place_of(backend.device)),
            **_place(backend),
            global_batch_size=batch,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )
        logger, progress = _loggers(config, backend, console, run_dir, resume_from, environment)
        profiler = _profiler(config, backend, console, run_dir)
        interrupt = Interrupt(lambda text: console.print(text, highlight=False))
        trainer = Trainer(
            backend,
            model,
            optimizer,
            task=task,
            schedule=schedule,
            schedule_interval=interval,
            precision=config.precision,
            channels_last=config.channels_last,
            accumulate=config.accumulate,
            clip_norm=config.clip_norm,
            on_nan=config.on_nan,
            seed=config.seed,
            workers=config.workers,
            logger=logger,
            log_every=config.log_every,
            progress=progress,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint_every,
            checkpoint_minutes=config.checkpoint_minutes,
            stop_requested=lambda: stop() or interrupt(),
            callbacks=[*getattr(task, "build_callbacks", list)(), *profiler],
            compile=config.compile,
            checkpoint_modules=config.checkpoint_modules,
            checkpoint_policy=config.checkpoint_policy,
            shard_modules=config.shard_modules,
            find_unused_parameters=config.find_unused_parameters,
            static_graph=config.static_graph,
            reduce_dtype=config.reduce_dtype,
            compression=config.compression,
            sync=config.sync,
            sync_group=config.sync_group,
            bucket_bytes=None if config.bucket_mb is None else int(config.bucket_mb * 2**20),
        )
        try:
            with interrupt:
                result = trainer.fit(
                    train_data,
                    eval_data,
                    epochs=config.epochs,
                    max_steps=config.max_steps,
                    global_batch_size=batch,
                    eval_batch_size=config.eval_batch_size,
                    eval_every=config.eval_every,
                    last_batch=config.last_batch,
                    partition=config.partition,
                    resume_from=resume_from,
                )
            for each in profiler:
                each.finish(trainer)
        finally:
            for each in profiler:
                each.close()
            logger.close()
        summary = _summary(config, backend, trainer.replica, result, batch, time.monotonic() - began)
        if backend.rank == 0:
            _conclude(config, summary, result, console, run_dir)
            checkpoints.release()
    return summary


def _check_combination(config: TrainConfig, backend: Backend) -> None:
    """Refuse what does not go together, before there is a folder."""
    asked: dict[str, object] = {name: getattr(config, name) for name in ASKED_BY if hasattr(config, name)}
    asked |= {
        "accumulate": config.accumulate > 1,
        "on_nan": config.on_nan == "skip",
        "bucket_bytes": config.bucket_mb is not None,
        "master_weights": config.precision == "bf16-pure",
        "scaler": config.precision == "fp16",
    }
    check_combination(asked, backend.name)


def _console(backend: Backend) -> Console:
    # mpirun and srun give their ranks a terminal that is none: they put a name before each line, or write to a file.
    forwarded = may_join_by_mpi(backend.topology.launcher)
    return LastingConsole(
        quiet=backend.rank != 0, soft_wrap=True, force_terminal=False if forwarded else None,
        markup=False, emoji=False,  # names of metrics, folders and hosts are no markup
    )  # fmt: skip


def _backend(config: TrainConfig) -> Backend:
    detection = detect()
    name, _ = backends.choose(detection, config.backend)
    if config.data_parallel and name != "local":
        raise ConfigError(
            f"--data-parallel is one process with several GPUs, but backend {name} was chosen for {detection.reason}"
        )
    options: dict[str, Any] = {"device": config.device, "timeout_s": config.timeout}
    if name == "local":
        options["data_parallel"] = config.data_parallel
    if config.process_group != "auto":
        options["process_group"] = config.process_group
    if config.all_reduce != "auto":
        options["all_reduce"] = config.all_reduce
    if name == "horovod":
        options.update(asdict(config.horovod))
        if config.profile is not None and config.horovod.timeline is None:
            options["timeline"] = DYNAMIC_TIMELINE
    elif config.horovod != HorovodConfig():
        raise ConfigError(
            f"--horovod.* settings are for backend horovod, but backend {name} was chosen for {detection.reason}; leave them out, "
            "or give --backend horovod"
        )
    return backends.create(config.backend, detection=detection, **options)


def _headline(backend: Backend) -> str:
    topology = backend.topology
    ranks = "1 rank" if topology.world_size == 1 else f"{topology.world_size} ranks"
    nodes = "" if topology.num_nodes == 1 else f" on {topology.num_nodes} nodes"
    return (
        f"hvdtrain {__version__}: backend {backend.name} ({backend.engine}), {ranks}{nodes}, {backend.device.type} "
        f"({backend.detection.reason})"
    )


def _say_recommendation(config: TrainConfig, console: Console) -> None:
    run = asked_for(config.backend)
    differs = "" if run is None else measured_otherwise(read_recommendation(run), config)
    if differs:
        console.print(f"note: {differs}", highlight=False)


def _be_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _task(config: TrainConfig, backend: Backend) -> Task:
    if config.task is not None:
        task = resolve(config.task, flag="--task")()
        if not isinstance(task, Task):
            missing = [n for n in ("build_model", "loss", "metrics", "train_data", "eval_data") if not hasattr(task, n)]
            raise ConfigError(f"--task {config.task.name} is no hvdtrain.Task: it lacks {', '.join(missing)}")
        return task
    assert config.data is not None
    assert config.model is not None
    data = load_data(config.data, folder=Path(config.data_dir), download=config.download, timeout_s=config.timeout)
    return _NamedClassification(
        _model_maker(config.model, data), data.train, data.evaluation, label_smoothing=config.label_smoothing, data=data
    )


class _NamedClassification(Classification):
    """Of --model and --data, with what the data say of themselves."""

    def __init__(self, *parts: Any, data: NamedData, **more: Any) -> None:
        super().__init__(*parts, **more)
        self.data = data


def _check_model(config: TrainConfig, task: Task, model: Any, backend: Backend) -> None:
    """Puts the model on its device, and sees that it is one, and takes the data."""
    if not isinstance(model, nn.Module):
        who = f"--model {config.model.name}" if config.model is not None else f"{type(task).__name__}.build_model"
        raise ConfigError(f"{who} made a {type(model).__name__}, not a torch.nn.Module")
    model.to(backend.device)
    if isinstance(task, _NamedClassification) and config.model is not None:
        check_model(model, task.data.shape, task.data.classes, name=config.model.name)


def _model_maker(component: Component, data: NamedData) -> Callable[[], nn.Module]:
    """A component's callable, with the data's shape filled in where the model asks for it and the user does not say."""
    own = {"cnn": models.cnn, "mlp": models.mlp}
    if component.name in own:
        build = resolve(component, where=(own,), flag="--model")
        if not data.shape or not data.classes:
            raise ConfigError(
                f"--model {component.name} needs images and classes, which --data does not say; name a model of your own by its "
                "import path, or return a NamedData with shape and classes"
            )
        fitting = {"channels": data.shape[0], "size": data.shape[-1], "classes": data.classes}
        return lambda: cast(nn.Module, build(**{k: v for k, v in fitting.items() if k not in build.kwargs}))
    build = resolve(component, where=(own, "torchvision.models"), flag="--model")
    torchvision = getattr(build.target, "__module__", "").startswith("torchvision.")
    extra = {"num_classes": data.classes} if torchvision and data.classes and "num_classes" not in build.kwargs else {}
    return lambda: cast(nn.Module, build(**extra))


def _steps_per_epoch(config: TrainConfig, data: Any, batch: int, backend: Backend) -> int | None:
    """Steps in an epoch; None with a stream, of which nobody knows."""
    source = source_of(data)
    if source.is_stream:
        return None
    samples = source.length
    if config.partition == "sample-own":
        samples = sum(backend.all_gather_object(samples))
    return BatchPartition(length=samples, global_batch_size=batch, last_batch=config.last_batch).steps_per_epoch


def _global_batch_size(config: TrainConfig, backend: Backend) -> int:
    if config.global_batch_size is not None:
        return config.global_batch_size
    assert config.batch_size is not None
    return config.batch_size * config.accumulate * backend.world_size


def _optimizer(config: TrainConfig, task: Task, model: nn.Module, backend: Backend) -> Optimizer:
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


def _schedule(
    config: TrainConfig, optimizer: Optimizer, backend: Backend, steps_per_epoch: int | None
) -> tuple[LRScheduler, str]:
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


def _checkpoints(config: TrainConfig, backend: Backend, run_dir: Path) -> Checkpoints:
    own: dict[str, Any] = {
        "lock": run_dir / ".lock",
        "settings": recorded(config, backend.world_size),
        "mirror": None if config.checkpoint_url is None else Mirror(config.checkpoint_url),
    }
    if config.checkpoint_async:
        # Before the other ranks give up waiting for rank 0, which waits for its disk.
        return AsyncCheckpoints(run_dir / "checkpoints", config.keep, wait_s=0.8 * config.timeout, **own)
    return Checkpoints(run_dir / "checkpoints", config.keep, **own)


def _begin(
    config: TrainConfig, backend: Backend, run_dir: Path, checkpoints: Checkpoints, console: Console
) -> Saved | None:
    """On rank 0: take the run's folder, find what to go on from, and leave only this run's line of checkpoints there."""
    named = config.resume not in ("auto", "never")
    found = opened(_named(config.resume, checkpoints)) if named else None  # a wrong name leaves no folder
    run_folder.make(run_dir)
    checkpoints.claim()
    if config.resume == "auto":
        found = checkpoints.latest()
    evaluates = config.epochs == 0
    if found is not None and not evaluates:
        said = compare(found.settings, config, backend.world_size, Path(found.path).name)
        if said:
            _log.warning("%s", said)
    if not evaluates:
        summary, metrics = run_dir / "summary.json", run_dir / "metrics.jsonl"
        moved = checkpoints.begin(found, beside=(run_dir / "config.yaml", metrics, summary))
        if moved:
            summary.unlink(missing_ok=True)
            console.print(moved, highlight=False, markup=False)
    _keep_record(config, run_dir, found)
    return found


def _named(which: str, checkpoints: Checkpoints) -> Path:
    """The checkpoint that ``--resume`` names: by its folder, or by its step in the run's own folder."""
    return checkpoints.folder / name_of(int(which)) if re.fullmatch(r"[0-9]{1,12}", which) else Path(which)


def _keep_record(config: TrainConfig, run_dir: Path, resume_from: Saved | None) -> None:
    """Write ``config.yaml``, or say why the one that is there stays."""
    file = run_dir / "config.yaml"
    goes_on = resume_from is not None and Path(resume_from.path).resolve().is_relative_to(run_dir.resolve())
    stays = what_stays(file, config, goes_on=goes_on)
    if stays is None:
        write_whole(file, record_text(config))
    elif stays:
        _log.warning("%s", stays)


def _loggers(
    config: TrainConfig,
    backend: Backend,
    console: Console,
    run_dir: Path,
    resume_from: Saved | None,
    environment: dict[str, Any],
) -> tuple[Logger, Callable[[StepRecord], None] | None]:
    """Who listens to logged steps and evaluations, and who to what happens between them."""
    if backend.rank != 0:
        return NullLogger(), None
    resumed_step = resume_from.step if resume_from else 0
    progress = ProgressLogger(console, config.epochs)
    own: list[Logger] = [progress, JsonlLogger(run_dir / "metrics.jsonl", resumed_step, environment)]
    tracked = [] if config.epochs == 0 else trackers.chosen(config.logger, run_dir, plain(config), resumed_step)
    return FanOut([*own, *tracked]), FanOut([progress]).log_step


def _profiler(config: TrainConfig, backend: Backend, console: Console, run_dir: Path) -> list[Profiler]:
    """What profiles the steps that were asked for, if there are some."""
    steps = steps_of(config.profile)
    if steps is None:
        return []
    tell = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    return [Profiler(backend, steps, run_dir / "profile", tell)]


def _conclude(config: TrainConfig, summary: Summary, result: FitResult, console: Console, run_dir: Path) -> None:
    if not (run_dir / "config.yaml").exists():  # somebody has deleted the folder meanwhile
        write_whole(run_dir / "config.yaml", record_text(config))
    file = run_dir / "summary.json"
    if result.samples or result.resumed_from is None or not file.exists():
        write_summary(summary, file)
        show_summary(summary, console, run_dir)
        if result.stopped:
            console.print(f"ended early: {result.stopped}", highlight=False, markup=False)
        return
    done = f"{result.epochs} epochs, {result.steps} steps"
    if config.epochs == 0:
        line = f"evaluated {result.resumed_from} ({done}); {file} stays as it was"
    elif result.stopped:
        line = f"this run was ended by a callback already: {done}, {result.stopped}. {file} stays as it was"
    else:
        line = f"this run was finished already: {done}. {file} stays as it was; more --epochs go on, another --run-dir begins anew"
    console.print(line, highlight=False, markup=False)


def _place(backend: Backend) -> dict[str, Any]:
    """Where a run runs, by the names that `Summary` has for it."""
    return {
        "backend": backend.name,
        "engine": backend.engine,
        "launcher": backend.topology.launcher,
        "world_size": backend.world_size,
        "num_nodes": backend.topology.num_nodes,
        "device": str(backend.device),
    }


def _summary(
    config: TrainConfig, backend: Backend, replica: Replica, result: FitResult, batch: int, wall_seconds: float
) -> Summary:
    norm, sha256 = _fingerprint(backend, replica)
    return Summary(
        **_place(backend),
        global_batch_size=batch,
        epochs=result.epochs,
        steps=result.steps,
        skipped_steps=result.skipped_steps,
        train_loss=result.train_loss,
        eval_loss=result.eval_metrics.get("loss"),
        eval_accuracy=result.eval_metrics.get("accuracy"),
        eval_metrics=result.eval_metrics,
        samples_per_second=result.samples / result.train_seconds if result.train_seconds else None,
        sent_bytes_per_step=result.sent_bytes_per_step if result.samples else None,
        wall_seconds=wall_seconds,
        seed=config.seed,
        precision=config.precision,
        parameters=sum(p.numel() for p in replica.module.parameters()),
        parameters_norm=norm,
        parameters_sha256=sha256,
        resumed_from=result.resumed_from,
        hvdtrain_version=__version__,
        torch_version=str(torch.__version__),
    )


def _fingerprint(backend: Backend, replica: Replica) -> tuple[float, str]:
    """The norm and the SHA-256 of the whole model; every rank must call it."""
    state = whole(model_state(replica.module, cut=True), root=backend.rank == 0)
    found: tuple[float, str] | None = None
    if backend.rank == 0 or not replica.is_cut:
        names = [without_compile(name) for name, _ in replica.module.named_parameters()]
        found = parameters_norm({name: state[name] for name in names}), parameters_sha256(state)
    return cast(tuple[float, str], backend.broadcast_object(found) if replica.is_cut else found)
