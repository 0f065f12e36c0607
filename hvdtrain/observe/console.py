"""The console on which rank 0 tells how far the run is."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class LastingConsole(Console):
    """A console whose reader may go away: a run of days does not end because a pipe or a launcher did."""

    def on_broken_pipe(self) -> None:
        """Say no more, where rich would end the process."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
