"""One training run out of one configuration: what `hvdtrain.building` makes of it, put together, trained, and written down."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hvdtrain import backends
from hvdtrain.backends.base import Backend
from hvdtrain.backends.exclusions import ASKED_BY, check_combination
from hvdtrain.backends.recommended import asked_for, measured_otherwise, read_recommendation
from hvdtrain.building.learned import place_model, task_of
from hvdtrain.building.optimizing import global_batch_size, optimizer_of, schedule_of, steps_per_epoch
from hvdtrain.building.summing_up import place, summary_of
from hvdtrain.compression.choosing import chosen as compression_of
from hvdtrain.errors import ConfigError
from hvdtrain.launch.detect import Detection, detect
from hvdtrain.launch.launchers import may_join_by_mpi
from hvdtrain.observe import run_folder, trackers
from hvdtrain.observe.console import LastingConsole
from hvdtrain.observe.jsonl import JsonlLogger
from hvdtrain.observe.logger import FanOut, Logger, NullLogger, StepRecord
from hvdtrain.observe.progress import ProgressLogger
from hvdtrain.observe.summary import Summary, show_summary, write_summary
from hvdtrain.observe.surroundings import place_of, surroundings
from hvdtrain.observe.whole_file import write_whole
from hvdtrain.profiling.profiler import Profiler
from hvdtrain.settings.config import HorovodConfig, TrainConfig
from hvdtrain.settings.horovod_config import DYNAMIC_TIMELINE
from hvdtrain.settings.layers import plain
from hvdtrain.settings.profiling import steps_of
from hvdtrain.settings.record import record_text, what_stays
from hvdtrain.settings.resuming import compare, recorded
from hvdtrain.sync_batch_norm import convert_sync_batch_norm
from hvdtrain.training.async_checkpoints import AsyncCheckpoints
from hvdtrain.training.checkpoint import Checkpoints, agree, opened
from hvdtrain.training.checkpoint_files import Saved, name_of
from hvdtrain.training.interrupt import Interrupt
from hvdtrain.training.ledger import FitResult
from hvdtrain.training.mirror import Mirror
from hvdtrain.training.precision import lie_channels_last
from hvdtrain.training.random_numbers import seed_everything
from hvdtrain.training.stopping import StopRequest
from hvdtrain.training.trainer import Trainer
from hvdtrain.version import __version__

_log = logging.getLogger(__name__)


def run_training(config: TrainConfig, detection: Detection | None = None) -> Summary:
    """Train as configured, on this rank.

    Args:
        config: What is asked for.
        detection: How this process was started; None to find out.

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
    with StopRequest() as stop, _backend(config, detection or detect()) as backend:
        _check_combination(config, backend)
        console = _console(backend)
        console.print(_headline(backend), highlight=False)
        _say_recommendation(config, console)
        run_dir = Path(backend.broadcast_object(str(run_folder.choose(config.run_dir)) if backend.rank == 0 else ""))
        seed_everything(config.seed)  # alike on every rank: so are the models, whatever the world size
        task = task_of(config)
        model, train_data, eval_data = task.build_model(), task.train_data(), task.eval_data()
        place_model(config, task, model, backend)
        if config.sync_batch_norm:
            model = convert_sync_batch_norm(model, backend)
        if config.channels_last:
            lie_channels_last(model)  # before an optimizer's state lies as the model does
        batch = global_batch_size(config, backend)
        an_epoch = steps_per_epoch(config, train_data, batch, backend)
        if config.epochs == 0 and eval_data is None:
            raise ConfigError("--epochs 0 only evaluates, and there are no evaluation data; train for some --epochs")
        optimizer = optimizer_of(config, task, model, backend)
        schedule, interval = schedule_of(config, optimizer, backend, an_epoch)
        checkpoints = _checkpoints(config, backend, run_dir)
        resume_from = agree(backend, lambda: _begin(config, backend, run_dir, checkpoints, console))
        environment = surroundings(
            backend.all_gather_object(place_of(backend.device)),
            **place(backend),
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
        summary = summary_of(config, backend, trainer.replica, result, batch, time.monotonic() - began)
        if backend.rank == 0:
            _conclude(config, summary, result, console, run_dir)
            checkpoints.release()
    return summary


def _check_combination(config: TrainConfig, backend: Backend) -> None:
    """Refuse what does not go together, and a compression that cannot be made, before there is a folder."""
    compression_of(config.compression)
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


def _backend(config: TrainConfig, detection: Detection) -> Backend:
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
    progress = ProgressLogger(config.epochs, console)
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
