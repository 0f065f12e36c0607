"""Which machine this is, by what its system says."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A machine.

    Attributes:
        host: Its name.
        processor: The CPU's name, or else its architecture.
        cpus: How many it has.
    """

    host: str
    processor: str
    cpus: int

    def as_json(self) -> dict[str, Any]:
        """For files."""
        return asdict(self)


def this_machine() -> Machine:
    """The one that this process runs on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return Machine(host=socket.gethostname(), processor=name, cpus=os.cpu_count() or 1)
