"""A Python that has PyTorch loaded: launchers start a small program that asks it for a copy, which saves each rank two seconds.

    argv = warm.instead_of_python([sys.executable, "-m", "hvdtrain", ...])

The ranks are processes of their own, started by the real launcher and run as ``python -m MODULE``, ``python FILE`` or ``python -c
CODE`` would; only `import torch` has been done before the fork. What they are not is children of the launcher: signals that end the
small program are passed on, and its end is theirs, but who looks for a rank among a launcher's children does not find it. Jobs whose
environment holds something that Python or PyTorch read while they are loaded are started by a Python of their own.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_STARTED: list[str] = []


def instead_of_python(argv: list[str]) -> list[str]:
    """A command with each word that is this Python replaced by the small program."""
    return [_program() if word == sys.executable else word for word in argv]


def _program() -> str:
    if not _STARTED:
        folder = tempfile.TemporaryDirectory(prefix="warm-")
        here, socket, program = Path(__file__).parent, Path(folder.name, "s"), Path(folder.name, "python")
        # -I: nothing of the job's environment is for this program; -S: it needs nothing but the standard library.
        program.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -I -S "{here}/warm_start.py" "{program}" "{sys.executable}" "{socket}" "$@"\n'
        )
        program.chmod(0o700)
        server = subprocess.Popen(
            [sys.executable, str(here / "warm_server.py"), str(socket)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

        def end() -> None:
            assert server.stdin is not None
            server.stdin.close()  # which it takes for its end, whatever way this process ends
            server.wait(timeout=30)
            folder.cleanup()

        atexit.register(end)
        _STARTED.append(str(program))
    return _STARTED[0]
