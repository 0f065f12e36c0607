"""The folder of a run: refused early if nothing can be written in it, made only when there is something to put into it."""

from __future__ import annotations

import os
import tempfile
from datetime import datetime
from pathlib import Path

from hvdtrain.errors import ConfigError


def choose(name: str | None) -> Path:
    """The folder of this name, or a new one below ``runs/``; it need not exist, and is not made.

    Raises:
        ConfigError: It could not be made, or nothing can be written in it.
    """
    folder = Path(name or f"runs/{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}")
    existing = folder
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise _refusal(folder, error) from error
    return folder


def make(folder: Path) -> None:
    """Make the folder, if it is not there.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(folder, error) from error


def _refusal(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"--run-dir: nothing can be written in {folder} ({error.strerror}); name a folder that this user may write in"
    )
