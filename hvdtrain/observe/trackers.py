"""Experiment trackers that a run reports to, by their own libraries: TensorBoard, Weights & Biases, MLflow.

Each keeps what it writes in the run's folder unless its own settings say otherwise (WANDB_MODE, MLFLOW_TRACKING_URI), and a run
that goes on goes on there too. They are imported only where they are wanted.
"""

from __future__ import annotations

import importlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

from hvdtrain.errors import ConfigError
from hvdtrain.launch.environment import given
from hvdtrain.observe.logger import EvalRecord, Logger, StepRecord
from hvdtrain.observe.whole_file import write_whole
from hvdtrain.settings.config import trackers_of

_NO_CURVES = ("step", "total_steps", "epoch", "train_seconds", "phase_seconds")


def chosen(text: str, folder: Path, settings: Mapping[str, Any], resumed_step: int) -> list[Logger]:
    """Make the trackers that ``--logger`` names.

    Args:
        text: "auto", "none", or names with commas between.
        folder: Of the run.
        settings: Of the run, to be shown beside its curves.
        resumed_step: The step that the run goes on from; 0 begins anew.

    Raises:
        ConfigError: One of them is not installed, or does not start; says what to do.
    """
    if text == "auto":
        return [TensorBoard(folder, settings, resumed_step)] if find_spec("tensorboard") else []
    if text == "none":
        return []
    return [_KINDS[name](folder, settings, resumed_step) for name in trackers_of(text)]


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder: ``tensorboard --logdir runs``. Nothing is written before a record.

    They are written here and not by torch's SummaryWriter, whose thread fails loudly when a file of its is deleted.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resumed_step: int) -> None:
        self._protocol = _imported("tensorboard.compat.proto.event_pb2")
        self._writing = _imported("tensorboard.summary.writer.record_writer")
        self._folder, self._settings, self._resumed_step = folder / "tensorboard", settings, resumed_step
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def log_step(self, record: StepRecord) -> None:
        """Add a point to each curve."""
        self._add(_of_step(record), record.step)

    def log_eval(self, record: EvalRecord) -> None:
        """Add a point to each curve of evaluations."""
        self._add(_of_eval(record), record.step)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _add(self, values: Mapping[str, float], step: int) -> None:
        if self._path is None or not self._path.exists():
            self._open()
        points = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._write(step=step, summary={"value": points})

    def _open(self) -> None:
        """Begin a file: the first, or one in the place of one that was deleted."""
        from torch.utils.tensorboard.summary import text  # noqa: PLC0415 - seldom wanted

        self.close()
        first = self._path is None
        self._folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()  # files are read in the order of their names
        self._path = (
            self._folder / f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{os.getpid()}.{now % 10**9}"
        )
        self._file = self._path.open("xb")
        self._write(file_version="brain.Event:2")
        if first:
            # What an earlier run wrote beyond the checkpoint that this one goes on from is hidden by a start at a step.
            beyond = self._resumed_step + 1 if self._resumed_step else 0
            self._write(step=beyond, session_log={"status": self._protocol.SessionLog.START})
        said = "\n".join(f"    {name}: {value}" for name, value in _flat(self._settings))
        self._write(step=self._resumed_step, summary=text("settings", said))

    def _write(self, **content: Any) -> None:
        assert self._file is not None
        event = self._protocol.Event(wall_time=time.time(), **content)
        self._writing.RecordWriter(self._file).write(event.SerializeToString())
        self._file.flush()


class WeightsAndBiases:
    """A run of wandb; its number is kept in the run's folder. WANDB_PROJECT and the like are wandb's own."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], resumed_step: int) -> None:
        wandb = _imported("wandb")
        number = _number(folder / "wandb_run", resumed_step)
        try:
            self._run: Any = wandb.init(
                dir=str(folder),
                id=number,
                name=folder.name,
                resume="allow" if resumed_step else None,
                config=dict(_flat(settings)),
            )
        except Exception as error:
            _refuse("wandb", error, "wandb login, or WANDB_MODE=offline")

    def log_step(self, record: StepRecord) -> None:
        """Add a point to each curve."""
        self._run.log(_of_step(record), step=record.step)

    def log_eval(self, record: EvalRecord) -> None:
        """Add a point to each curve of evaluations."""
        self._run.log(_of_eval(record), step=record.step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow, in ``mlflow.db`` of the run's folder unless MLFLOW_TRACKING_URI says otherwise."""

    _PARAM_CHARACTERS: ClassVar[int] = 500

    def __init__(self, folder: Path, settings: Mapping[str, Any], resumed_step: int) -> None:
        tracking = _imported("mlflow").tracking
        place = given("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').absolute()}"
        try:
            self._client: Any = tracking.MlflowClient(tracking_uri=place)
            number = _kept(folder / "mlflow_run") if resumed_step else ""
            if number:
                self._client.set_terminated(number, "RUNNING")
            else:
                experiment = given("MLFLOW_EXPERIMENT_ID") or "0"
                number = self._client.create_run(experiment, run_name=folder.name).info.run_id
                write_whole(folder / "mlflow_run", f"{number}\n")
                param = _imported("mlflow.entities").Param
                said = [param(name, str(value)[: self._PARAM_CHARACTERS]) for name, value in _flat(settings)]
                self._client.log_batch(number, params=said)
        except Exception as error:
            _refuse("mlflow", error, "MLFLOW_TRACKING_URI names a server that answers, or nothing for the run's folder")
        self._number = number

    def log_step(self, record: StepRecord) -> None:
        """Add a point to each curve."""
        self._add(_of_step(record), record.step)

    def log_eval(self, record: EvalRecord) -> None:
        """Add a point to each curve of evaluations."""
        self._add(_of_eval(record), record.step)

    def close(self) -> None:
        """Finish the run."""
        self._client.set_terminated(self._number)

    def _add(self, values: Mapping[str, float], step: int) -> None:
        metric = _imported("mlflow.entities").Metric
        now = int(1000 * time.time())
        self._client.log_batch(self._number, [metric(name, value, now, step) for name, value in values.items()])


_KINDS: dict[str, Callable[[Path, Mapping[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def _of_step(record: StepRecord) -> dict[str, float]:
    found = {
        f"train/{name}": value for name, value in asdict(record).items() if name not in _NO_CURVES and value is not None
    }
    phases = record.phase_seconds or {}
    return found | {f"step_seconds/{phase}": sum(ranks) / len(ranks) for phase, ranks in phases.items() if ranks}


def _of_eval(record: EvalRecord) -> dict[str, float]:
    return {f"eval/{name}": value for name, value in record.metrics.items()}


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Settings of settings by names with dots."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _number(file: Path, resumed_step: int) -> str:
    """The run's number with a tracker: the one that it had, where it goes on."""
    number = (_kept(file) if resumed_step else "") or secrets.token_hex(4)
    write_whole(file, f"{number}\n")
    return number


def _kept(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken installation raises whatever it likes
        name = module.partition(".")[0]
        if not isinstance(error, ImportError):
            raise ConfigError(
                f"--logger {name}: importing it fails: {type(error).__name__}: {error}; reinstall it, or leave it out"
            ) from error
        raise ConfigError(f"--logger {name}: {error}; pip install 'hvdtrain[trackers]', or leave it out") from error


def _refuse(name: str, error: Exception, remedy: str) -> NoReturn:
    raise ConfigError(
        f"--logger {name} does not start: {type(error).__name__}: {error}; {remedy}, or leave it out"
    ) from error
