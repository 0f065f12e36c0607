"""Questions to other processes, which may crash, hang or talk too much without harm to who asks."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.doctor.telling import telling
from hvdtrain.horovod_build.running import OUT_OF_TIME, Log, run

LIMIT_S = 60.0
_MARK = "hvdtrain doctor: "


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """How a process ended, and what it said.

    Attributes:
        code: Its exit code; negative for a signal.
        lines: Of both of its outputs.
    """

    code: int
    lines: tuple[str, ...]

    @property
    def facts(self) -> list[dict[str, Any]]:
        """What it said by `tell`, in the order in which it came."""
        return [json.loads(line.partition(_MARK)[2]) for line in self.lines if _MARK in line]

    @property
    def how(self) -> str:
        """How it ended, in words, with the line of its output that says most."""
        if self.code == OUT_OF_TIME:
            return "no answer in time"
        ended = f"died of {_signal(-self.code)}" if self.code < 0 else f"exit code {self.code}"
        said = telling([line for line in self.lines if _MARK not in line])
        return f"{said} ({ended})" if said else ended


def ask(command: Sequence[str], *, limit_s: float = LIMIT_S, environment: Mapping[str, str] | None = None) -> Answer:
    """Run a program to its end; whatever it started ends with it.

    Args:
        command: The program and its arguments.
        limit_s: Seconds that it may take.
        environment: All its variables; None: those of this process.
    """
    log = Log(Path(os.devnull))  # nothing may depend on a folder that can be written to
    try:
        with ended_by_signals():
            code, lines = run(
                command, log=log, environment=environment or os.environ, folder=Path.cwd(), limit_s=limit_s
            )
    finally:
        log.close()
    return Answer(code=code, lines=tuple(lines))


def ask_python(program: str, *words: str, limit_s: float = LIMIT_S) -> Answer:
    """Run a few lines of Python that end in ``tell(...)`` in this environment's Python."""
    return ask([sys.executable, "-c", _TELL + program, *words], limit_s=limit_s)


def tell(**facts: Any) -> None:
    """Say facts to whoever asked."""
    sys.stdout.write(f"\n{_MARK}{json.dumps(facts)}\n")
    sys.stdout.flush()


_TELL = f"""
import json, sys
def tell(**facts):
    sys.stdout.write("\\n{_MARK}" + json.dumps(facts) + "\\n")
    sys.stdout.flush()
"""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Whoever ends this process by SIGTERM or SIGHUP ends what it has started too, which has a session of its own."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
