"""A launcher that goes on waiting for a host that is gone, after all ranks that could be reached have ended.

mpirun asks its daemons to end their ranks, and one on a host that was cut off never answers: until TCP gives up, after a
quarter of an hour, mpirun would stay, and with it the user's script.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from hvdtrain.launch.ancestry import Ancestor, read_ancestors

_NAMES = (
    "mpirun",
    "mpiexec",
    "prterun",
    "orterun",
    "mpirun.openmpi",
    "mpiexec.openmpi",
    "mpirun.mpich",
    "mpiexec.hydra",
)
_WAIT = """(
trap '' PIPE  # nobody may read this rank's output any more; mpirun's own goes on
alive() { [ "$(cut -d' ' -f22 /proc/$0/stat 2>/dev/null)" = "$1" ]; }
sleep "$2"
alive "$1" || exit 0
echo "hvdtrain: all ranks that can be reached have ended, but mpirun still waits for a host that cannot; ending it" > /proc/$0/fd/2
children=$(cat /proc/$0/task/$0/children)  # ssh to that host waits as well
kill -TERM $0; sleep 2
alive "$1" && kill -KILL $0
kill -TERM $children 2>/dev/null
) &"""


def end_if_stuck(after_s: float = 15.0, ancestors: Sequence[Ancestor] | None = None) -> int | None:
    """Leave a process behind that ends this rank's mpirun, if that is on this host and still there after ``after_s``.

    Returns:
        The process id of mpirun; None if none is among the ancestors.
    """
    for ancestor in read_ancestors() if ancestors is None else ancestors:
        if ancestor.program not in _NAMES:
            continue
        try:
            started = Path(f"/proc/{ancestor.pid}/stat").read_text().rpartition(")")[2].split()[19]
            subprocess.run(
                ["sh", "-c", _WAIT, str(ancestor.pid), started, f"{after_s:g}"],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                check=False,
            )
        except OSError:
            return None
        return ancestor.pid
    return None
