"""Whether a process of this host is running, stopped or gone, as the kernel shows it; for processes that are not ours to wait for."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """A process, also after its number has been given to another one.

    Attributes:
        pid: Its number.
        started: When it started, in the kernel's ticks.
        place: In which numbering of which host, since containers number their processes themselves.
    """

    pid: int
    started: int
    place: str

    @staticmethod
    def here() -> Process | None:
        """This one; None where the kernel does not tell."""
        found = _stat(os.getpid())
        place = _here()
        return Process(os.getpid(), int(found[19]), place) if found and place else None

    def is_here(self) -> bool:
        """Whether this process can see it, should it be alive; nothing else is true of one that is elsewhere."""
        return self.place == _here()

    def state(self) -> str:
        """One letter as in ``ps``; "" if it is gone."""
        found = _stat(self.pid)
        return found[0] if found and int(found[19]) == self.started else ""

    def is_gone(self) -> bool:
        """Whether it has ended, waited for or not."""
        return self.state() in ("", "Z", "X")

    def is_stopped(self) -> bool:
        """Whether it was stopped by a signal or a debugger."""
        return self.state() in ("T", "t")

    def ended(self) -> str:
        """How it ended, in words; "" if that cannot be seen (any more)."""
        found = _stat(self.pid)
        if not found or int(found[19]) != self.started or len(found) < 50:
            return ""
        status = int(found[49])
        if os.WIFSIGNALED(status):
            return f"signal {os.WTERMSIG(status)}"
        return f"exit code {os.WEXITSTATUS(status)}" if found[0] in "ZX" else ""

    def kill(self) -> None:
        """End it at once, which also works when it is stopped."""
        with suppress(OSError):
            if self.state():
                os.kill(self.pid, signal.SIGKILL)


def _here() -> str:
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
