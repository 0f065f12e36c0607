"""Runs the programs of a build: all output to a log file, lines to a watcher, an end after a bound time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from hvdtrain.horovod_build.failure import BuildError
from hvdtrain.launch.processes import descendants, lives, started

OUT_OF_TIME = 124
"""Exit code of a program that was ended because its time was up, as `timeout` has it."""
_LAST_LINES_S = 5.0
_BEGINS_S = 10.0
_ENDS_S = 10.0  # after a SIGKILL


class Reporter(Protocol):
    """Who is told how far the work is."""

    def tell(self, line: str) -> None:
        """A line that stays."""

    def show(self, fraction: float | None, what: str) -> None:
        """What is being done now, and how much of it is done (0 to 1)."""


class Log:
    """The full output of everything that was run.

    Args:
        path: Is created, with its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", errors="replace")

    def write(self, line: str) -> None:
        """Add a line."""
        self._file.write(line.rstrip("\n") + "\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing can be added from here on."""
        self._file.close()


def run(
    command: Sequence[str],
    *,
    log: Log,
    environment: Mapping[str, str],
    folder: Path,
    limit_s: float,
    watch: Callable[[str], None] = lambda line: None,
) -> tuple[int, list[str]]:
    """Run a program to its end; whatever it started ends with it.

    Args:
        command: The program and its arguments.
        log: Takes the command and its output.
        environment: All its variables.
        folder: Where it runs.
        limit_s: Seconds that it may take.
        watch: Called with each line.

    Returns:
        The exit code (`OUT_OF_TIME` when its time was up), and the lines.
    """
    log.write(f"$ {' '.join(command)}")
    lines: list[str] = []
    beginning: Future[subprocess.Popen[str]] = Future()

    def begin_and_read() -> None:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except BaseException as error:
            beginning.set_exception(error)
            return
        beginning.set_result(process)
        assert process.stdout is not None
        with process.stdout, contextlib.suppress(ValueError):  # the log is closed: what outlives its parent writes on
            for line in process.stdout:
                log.write(line)
                lines.append(line.rstrip("\n"))
                watch(line)

    # Signals interrupt the main thread alone: begun in another, no process can be left behind by one that comes meanwhile.
    reader = threading.Thread(target=begin_and_read, name="build-output", daemon=True)
    try:
        reader.start()
        code = beginning.result().wait(timeout=limit_s)
    except OSError as error:
        log.write(str(error))
        return 127, [str(error)]
    except subprocess.TimeoutExpired:
        _end(beginning)
        reader.join(_LAST_LINES_S)
        log.write(f"ended after {limit_s:.0f} s")
        return OUT_OF_TIME, [*lines, f"it was ended after {limit_s:.0f} s"]
    except BaseException:  # Ctrl-C: a session of its own does not hear it
        _end(beginning)
        raise
    reader.join(_LAST_LINES_S)  # not longer: a daemon that the build started may hold the pipe open
    return code, list(lines)


def _end(beginning: Future[subprocess.Popen[str]]) -> None:
    """End a process that has begun or is about to, with its children, also those with sessions of their own (torchrun's ranks)."""
    try:
        process = beginning.result(_BEGINS_S)
    except (OSError, FutureTimeout):  # it never began
        return
    below = {pid: started(pid) for pid in descendants(process.pid)}
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_ENDS_S)
    for pid in below:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + _ENDS_S
    while time.monotonic() < end and any(lives(*one) for one in below.items()):
        time.sleep(0.01)


def pip() -> list[str]:
    """The command that runs pip for this Python, also where the environment has none (uv makes such).

    Raises:
        BuildError: There is no pip at all.
    """
    quiet = ["--disable-pip-version-check", "--no-input"]
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", *quiet]
    spec = find_spec("ensurepip")
    folders = [Path(folder, "_bundled") for folder in spec.submodule_search_locations or []] if spec else []
    # Distributions keep the wheel of ensurepip elsewhere.
    folders += [Path(sysconfig.get_config_var("WHEEL_PKG_DIR") or "/usr/share/python-wheels")]
    for folder in folders:
        for wheel in sorted(folder.glob("pip-*.whl")):
            return [sys.executable, str(wheel / "pip"), *quiet]  # a wheel is a zip file, which Python runs
    raise BuildError(f"pip is missing in {sys.prefix}; type: {sys.executable} -m ensurepip, or: uv pip install pip")
