"""The table of subcommands, and ``main``, which picks one, runs it and turns errors into exit codes.

A subcommand is a module with ``run(argv: list[str]) -> int`` (the exit code) and one row of :data:`COMMANDS`. The
module is imported only when its subcommand was asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

from hvdtrain.cli.voice import complain, interrupted
from hvdtrain.errors import HvdtrainError
from hvdtrain.settings.flags import UsageError
from hvdtrain.settings.wording import did_you_mean

DEFAULT_COMMAND = "train"
COMMANDS: Mapping[str, str] = {
    "train": "hvdtrain.cli.train",
    "export": "hvdtrain.cli.export",
    "import": "hvdtrain.cli.import_file",
    "doctor": "hvdtrain.cli.doctor",
    "guard": "hvdtrain.cli.guard",
    "verify": "hvdtrain.cli.verify",
    "report": "hvdtrain.cli.report",
    "migrate": "hvdtrain.cli.migrate",
    "install-horovod": "hvdtrain.cli.install_horovod",
}
EXIT_INTERRUPTED = 130
"""128 + SIGINT (2), as shells have it."""


def main(argv: Sequence[str] | None = None, commands: Mapping[str, str] = COMMANDS) -> int:
    """Runs one subcommand and returns the exit code.

    Args:
        argv: The words after the program's name; None takes the process's own.
        commands: Name of each subcommand and the module that runs it.

    Returns:
        0, 1 (failed), 2 (wrong command line, configuration, launch or backend), 75 (asked to end, state saved), or
        130 (Ctrl-C). Exceptions that are not :class:`HvdtrainError` pass through with their traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        name, rest = _split(words, commands)
        code: int = importlib.import_module(commands[name]).run(rest)
    except HvdtrainError as error:
        complain(error, same_everywhere=isinstance(error, UsageError))
        return error.exit_code
    except KeyboardInterrupt:
        interrupted()
        return EXIT_INTERRUPTED
    return code


def _split(words: list[str], commands: Mapping[str, str]) -> tuple[str, list[str]]:
    """The subcommand and the words that are its own; flags without a subcommand are those of ``train``."""
    if not words or words[0].startswith("-"):
        return DEFAULT_COMMAND, words
    if words[0] not in commands:
        guess = did_you_mean(words[0], commands)
        raise UsageError(f"unknown subcommand {words[0]!r}{guess or '.'} Subcommands: {', '.join(commands)}")
    return words[0], words[1:]
