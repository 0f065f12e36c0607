"""Runs the programs of a build: all output to a log file, lines to a watcher, an end after a bound time."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import sysconfig
import time
from _thread import start_new_thread
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from hvdtrain.horovod_build.failure import BuildError
from hvdtrain.launch.processes import descendants, lives, started

_T = TypeVar("_T")
OUT_OF_TIME = 124
"""Exit code of a program that was ended because its time was up, as `timeout` has it."""
_LAST_LINES_S = 5.0
_BEGINS_S = 10.0
_ENDS_S = 10.0  # after a SIGKILL
_LISTENS_S = 0.1  # a signal that comes right before a wait does not end it


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
    begun: _Once[int] = _Once()
    ended: _Once[int] = _Once()
    read: _Once[None] = _Once()

    def begin() -> None:
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
            begun.set(error)
            return
        begun.set(process.pid)
        start_new_thread(read_lines, (process,))
        ended.set(process.wait())

    def read_lines(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        try:
            with process.stdout, contextlib.suppress(ValueError):  # a closed log: what outlives its parent writes on
                for line in process.stdout:
                    log.write(line)
                    lines.append(line.rstrip("\n"))
                    watch(line)
        finally:
            read.set(None)

    # Signals interrupt the main thread alone, which therefore touches no Popen, Thread, Event or Future: an interrupt at some
    # moments leaves their locks held, or becomes "RuntimeError: release unlocked lock".
    try:
        start_new_thread(begin, ())
        begun.get()
        code = ended.get(limit_s)
    except OSError as error:
        log.write(str(error))
        return 127, [str(error)]
    except Empty:
        _end(begun, ended)
        _last_lines(read)
        log.write(f"ended after {limit_s:.0f} s")
        return OUT_OF_TIME, [*lines, f"it was ended after {limit_s:.0f} s"]
    except BaseException:  # Ctrl-C: a session of its own does not hear it
        _end(begun, ended)
        raise
    _last_lines(read)
    return code, list(lines)


class _Once(Generic[_T]):
    """A value, or an error, that another thread finds; an interrupt of the wait for it loses neither."""

    def __init__(self) -> None:
        self._found: list[_T | BaseException] = []
        self._known: SimpleQueue[None] = SimpleQueue()

    def set(self, found: _T | BaseException) -> None:
        """Whoever waits goes on."""
        self._found.append(found)
        self._known.put(None)

    def get(self, limit_s: float | None = None) -> _T:
        """The value; raises the error, and `Empty` after `limit_s` seconds."""
        end = math.inf if limit_s is None else time.monotonic() + limit_s
        while not self._found:
            left_s = end - time.monotonic()
            if left_s <= 0:
                raise Empty
            with contextlib.suppress(Empty):
                self._known.get(timeout=min(left_s, _LISTENS_S))
        found = self._found[0]
        if isinstance(found, BaseException):
            raise found
        return found


def _last_lines(read: _Once[None]) -> None:
    """Waits for them, not long: a daemon that the build started may hold the pipe open."""
    with contextlib.suppress(Empty):
        read.get(_LAST_LINES_S)


def _end(begun: _Once[int], ended: _Once[int]) -> None:
    """End a process that has begun or is about to, with its children, also those with sessions of their own (torchrun's ranks)."""
    try:
        process = begun.get(_BEGINS_S)
    except (OSError, Empty):  # it never began
        return
    below = {pid: started(pid) for pid in descendants(process)}
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
    with contextlib.suppress(Empty):
        ended.get(_ENDS_S)
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
