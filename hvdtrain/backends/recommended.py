"""``--backend auto:RUN``: the engine that a recorded ``hvdtrain bench engines`` found the fastest, where it holds here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.launch.machine import Machine
from hvdtrain.settings.options import flag_of
from hvdtrain.settings.wording import shown
from hvdtrain.topology import Topology

PREFIX = "auto:"
RECORD = "engines.json"
"""The record's name in a folder."""
TRAINED = (
    "task", "model", "data", "batch_size", "global_batch_size", "precision", "accumulate", "compression", "sync", "shard_modules",
)  # fmt: skip
"""Settings on which the order of engines hangs most."""
_MOST_BYTES = 2**24
_REMEDY = "record one by hvdtrain bench engines --out FILE"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """What a record says.

    Attributes:
        file: Where it was read.
        best: The engine.
        rivals: Engines that its rounds do not tell from it.
        machine: On which it was measured.
        world_size: With how many ranks.
        launcher: Which started those of the best engine, as `Topology.launcher` has it.
        command: How that launcher was called, up to the program.
        device: What the ranks computed on: "cpu" or "cuda".
        trained: What they trained: settings that `TRAINED` names, as text.
    """

    file: Path
    best: str
    rivals: tuple[str, ...]
    machine: Machine
    world_size: int
    launcher: str
    command: str
    device: str
    trained: Mapping[str, str]


def asked_for(backend: str) -> str | None:
    """The RUN of a ``--backend auto:RUN``; None if it is something else."""
    return backend.removeprefix(PREFIX) if backend.startswith(PREFIX) else None


def read_recommendation(run: str) -> Recommendation:
    """Read a record, or the one in a folder.

    Raises:
        ConfigError: There is none, or it is damaged or something else.
    """
    given = Path(run)
    file = given / RECORD if given.is_dir() else given
    where = f"--backend {PREFIX}{run}"
    try:
        if file.exists() and not file.is_file():
            raise ConfigError(f"{where}: {file} is no file; {_REMEDY}")
        with file.open(encoding="utf-8") as opened:
            found = json.loads(opened.read(_MOST_BYTES))
    except OSError as error:
        raise ConfigError(f"{where}: {file} cannot be read ({error.strerror}); {_REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {file} is damaged, no JSON as a whole; {_REMEDY}") from error
    try:
        return _understood(file, found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{where}: {file} is no record of hvdtrain bench engines ({what}); {_REMEDY}") from error


def check_recommendation(found: Recommendation, topology: Topology, machine: Machine) -> None:
    """See that a record was made as this process was started.

    Raises:
        ConfigError: Some things differ; names each, and what to do.
    """
    here = {
        "host": (found.machine.host, machine.host),
        "processor": (found.machine.processor, machine.processor),
        "CPUs": (found.machine.cpus, machine.cpus),
        "ranks": (found.world_size, topology.world_size),
        "nodes": (1, topology.num_nodes),
        f"launcher of {found.best}": (found.launcher, topology.launcher),
    }
    differing = [f"{name} {there} there, {now} here" for name, (there, now) in here.items() if there != now]
    if differing:
        raise ConfigError(
            f"{found.file} recommends {found.best} for something else: {'; '.join(differing)}. Start it as it was measured "
            f"({found.command}), measure again as it is started here (hvdtrain bench engines --ranks {topology.world_size} "
            "--out FILE), or name a --backend"
        )


def check_device(found: Recommendation, device: str) -> None:
    """See that ranks compute on what they computed on.

    Raises:
        ConfigError: They do not.
    """
    if device != found.device:
        raise ConfigError(
            f"{found.file} recommends {found.best} for {found.device}, and this run computes on {device}; give --device {found.device}, "
            "measure again, or name a --backend"
        )


def trained_of(config: Any) -> dict[str, str]:
    """What a configuration trains, for a record."""
    return {name: str(getattr(config, name)).removesuffix("()") for name in TRAINED}


def measured_otherwise(found: Recommendation, config: Any) -> str:
    """How what a record was made with differs from what is trained now, for people; "" if it does not."""
    now = trained_of(config)
    differing = [
        f"{flag_of(name)} {there} there, {now[name]} here"
        for name, there in found.trained.items()
        if now.get(name, there) != there
    ]
    return f"{found.file} recommends {found.best} for another training: {'; '.join(differing)}" if differing else ""


def _understood(file: Path, found: Any) -> Recommendation:
    if not isinstance(found, dict):
        raise TypeError(f"it is {shown(found)}")
    if found["benchmark"] != "engines":
        raise ValueError(f"it is one of {shown(found['benchmark'])}")
    best, machine = _text(found["best"]), found["machine"]
    launch = found["launches"][best]
    return Recommendation(
        file=file,
        best=best,
        rivals=tuple(_text(each) for each in found["rivals"]),
        machine=Machine(
            host=_text(machine["host"]), processor=_text(machine["processor"]), cpus=_count(machine["cpus"])
        ),
        world_size=_count(found["world_size"]),
        launcher=_text(launch["launcher"]),
        command=_text(launch["command"]),
        device=_text(launch["device"]),
        trained={name: _text(value) for name, value in found.get("trained", {}).items()},
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or len(value) > 1000:
        raise TypeError(f"{shown(value)} where a name should be")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise TypeError(f"{shown(value)} where a number of things should be")
    return value
