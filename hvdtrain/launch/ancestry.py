"""The processes that this one descends from, as far as the kernel shows them.

They tell which of several launchers is the nearest, and what a launcher leaves out of the environment. Nothing here is
needed to run: where ``/proc`` cannot be read (another system, a hardened one) the list is empty or short.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_LIMIT = 64  # generations; real ones are fewer than 20, this only bounds the walk
_SLURM_STEP = re.compile(r"slurmstepd: \[\S+\.(\w+)\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ancestor:
    """A parent process, or a parent's parent.

    Attributes:
        arguments: Its command line, program first.
        environ: The environment it was started with; None when it belongs to another user and cannot be read.
        pid: Its process id; 0 in a list that was not read from this machine.
    """

    arguments: tuple[str, ...] = ()
    environ: Mapping[str, str] | None = None
    pid: int = 0

    @property
    def program(self) -> str:
        """Name of the program without its folder."""
        return self.arguments[0].rpartition("/")[2] if self.arguments else ""

    @property
    def script(self) -> str:
        """Name of what Python was started with, a file without its folder or a module; "" of another program."""
        if not self.program.startswith("python"):
            return ""
        for option, following in itertools.pairwise((*self.arguments[1:], "")):
            if option == "-m":
                return following
            if not option.startswith("-"):
                return option.rpartition("/")[2]
        return ""

    @property
    def slurm_step(self) -> str | None:
        """For Slurm's process that starts tasks, the step's name: a number under srun, else batch, interactive, ...

        This process runs as root, its environment is hidden from users; its title (``slurmstepd: [12.0]``) is not.
        """
        match = _SLURM_STEP.match(self.arguments[0]) if self.arguments else None
        return match[1] if match else None

    def option(self, name: str) -> str | None:
        """The word after ``name`` on the command line."""
        for word, following in itertools.pairwise(self.arguments):
            if word == name:
                return following
        return None


def read_ancestors() -> tuple[Ancestor, ...]:
    """Parent, grandparent, and so on, up to the first process or the first that is hidden."""
    found: list[Ancestor] = []
    pid = os.getppid()
    while pid > 0 and len(found) < _LIMIT:  # 0: the parent is outside this container
        folder = Path("/proc") / str(pid)
        try:
            arguments = _split(folder / "cmdline")
            parent = re.search(r"^PPid:\s*(\d+)", (folder / "status").read_text(errors="replace"), re.MULTILINE)
        except OSError:
            break
        try:
            environ = dict(entry.partition("=")[::2] for entry in _split(folder / "environ"))
        except OSError:
            found.append(Ancestor(arguments=arguments, pid=pid))
        else:
            found.append(Ancestor(arguments=arguments, environ=environ, pid=pid))
        pid = int(parent[1]) if parent else 0
    return tuple(found)


def _split(file: Path) -> tuple[str, ...]:
    return tuple(text for text in os.fsdecode(file.read_bytes()).split("\0") if text)
