"""``hvdtrain guard``: a launcher around which a signal becomes a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hvdtrain.cli.voice import say
from hvdtrain.errors import LaunchError
from hvdtrain.launch import guard
from hvdtrain.settings.flags import UsageError

_HELP = f"""\
usage: hvdtrain guard [--wait SECONDS] LAUNCHER [WORDS ...]

Run a launcher so that SIGTERM, SIGINT, SIGHUP or SIGUSR1 to this process lets
the ranks save and end: hvdtrain guard mpirun -np 4 python -m hvdtrain

  --wait SECONDS  how long they may take; then the launcher is ended ({guard.WAIT_S:g})

exit codes: 75 when they have saved and ended, whatever the launcher makes of
it; else the launcher's."""


def run(argv: Sequence[str]) -> int:
    """Runs what follows under guard.

    Returns:
        75 when the ranks saved and ended; else the launcher's exit code.

    Raises:
        HvdtrainError: Wrong words, or the launcher cannot be started.
    """
    words, wait_s = list(argv), guard.WAIT_S
    if words[:1] == ["--help"] or words[:1] == ["-h"]:
        say(_HELP)
        return 0
    if words[:1] == ["--wait"]:
        if len(words) < 2 or not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", words[1]):
            raise UsageError(f"--wait {' '.join(words[1:2])}: give seconds, such as --wait 120")
        wait_s, words = float(words[1]), words[2:]
    if words[:1] == ["--"]:
        words = words[1:]
    if not words or words[0].startswith("-"):
        raise UsageError(
            f"guard needs a launcher to run, and got {' '.join(words) or 'nothing'}: hvdtrain guard mpirun ..."
        )
    try:
        return guard.run(words, wait_s)
    except OSError as error:
        raise LaunchError(f"{words[0]} cannot be started: {error.strerror or error}") from error
