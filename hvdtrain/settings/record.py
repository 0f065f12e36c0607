"""``config.yaml`` in the folder of a run: the whole configuration as it ran, which ``--config`` makes an equal one of.

This module compares and composes text; it writes no file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.settings.flags import Flags, build, config_text
from hvdtrain.settings.layers import plain
from hvdtrain.settings.options import every_option_of
from hvdtrain.settings.yaml_text import dump

_TITLE = "# The configuration of the run in this folder, written by hvdtrain; hvdtrain --config takes it."
_WHICH_RUN = ("run_dir", "resume")
"""Settings that say which run is meant and not what it does."""


def record_text(config: Any) -> str:
    """What a run's ``config.yaml`` holds."""
    return f"{_TITLE}\n\n{config_text(config)}"


def is_record(path: Path) -> bool:
    """Whether a file is one that :func:`record_text` made, and not a file of the user's."""
    try:
        return path.is_file() and path.read_text(encoding="utf-8", errors="replace").startswith(_TITLE)
    except OSError:
        return False


def differences(path: Path, config: Any) -> list[str]:
    """How a configuration differs from the one in a file: ``"--epochs 3 (2 in config.yaml)"``; empty if it does not.

    Args:
        path: A YAML file.
        config: An options dataclass.

    Raises:
        ConfigError: The file cannot be read, or holds no such configuration.
    """
    cls: type = type(config)
    before = plain(build(cls, Flags(files=(str(path),))))
    now = plain(config)
    different = []
    for entry in every_option_of(cls):
        if entry.name in _WHICH_RUN:
            continue
        ours, theirs = value_of(now, entry.name), value_of(before, entry.name)
        if ours != theirs:
            different.append(f"{entry.flag} {shown(ours)} ({shown(theirs)} in {path.name})")
    return different


def what_stays(path: Path, config: Any, *, goes_on: bool) -> str | None:
    """Whether a ``config.yaml`` that is there is to be left alone, and what the user should know of it.

    Args:
        path: The file.
        config: The configuration of the run that begins.
        goes_on: Whether it continues the run of this folder.

    Returns:
        None if the file is to be written; else a sentence, which is empty if it says the same as ``config``, or if the run goes
        on: what differs from its checkpoint is then said elsewhere (`hvdtrain.settings.resuming`).
    """
    if not path.exists():
        return None
    try:
        if not path.is_file():  # a FIFO would be waited for
            raise ConfigError("it is no plain file")
        different = differences(path, config)
    except ConfigError as error:
        different = [f"it cannot be compared: {error}"]
    if not different:
        return ""
    if goes_on:
        return ""
    if is_record(path):
        return None
    return f"{path} was not written by hvdtrain, so it stays, though this run differs: {'; '.join(different)}"


def value_of(values: dict[str, Any], name: str) -> Any:
    """A setting's value among those of `plain`, ``horovod.op`` included."""
    section, _, field_name = name.rpartition(".")
    return values[section][field_name] if section else values[name]


def shown(value: Any) -> str:
    """A value as YAML has it."""
    return dump({"x": value}).removeprefix("x: ").strip()
