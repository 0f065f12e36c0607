"""How subcommands read their words: flags, and where they name files such as ``hvdtrain export RUN OUT``, those too."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hvdtrain.cli.voice import say
from hvdtrain.settings.flags import Flags, UsageError, build, config_text, help_text, read_flags
from hvdtrain.version import __version__

_MOST_WORDS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command line that was read.

    Attributes:
        places: The words that belong to no flag, in their order.
        config: The options; None if only help, the version or the configuration is wanted.
        flags: As they were typed.
    """

    places: tuple[str, ...]
    config: Any
    flags: Flags


def read(cls: type, argv: Sequence[str], names: tuple[str, ...]) -> Command:
    """Read flags and exactly one word for each of these names.

    Args:
        cls: The options.
        argv: What was typed.
        names: For messages. A last one that ends in "..." stands for one word or more.

    Raises:
        ConfigError: A flag is wrong, or a word is missing or too many.
    """
    several = bool(names) and names[-1].endswith("...")
    flags = read_flags(cls, argv, places=_MOST_WORDS if several else len(names))
    if flags.switches:
        return Command(places=(), config=None, flags=flags)
    if len(flags.places) < len(names):
        missing = names[len(flags.places)].removesuffix("...")
        raise UsageError(f"{missing} is missing; --help shows what to give")
    return Command(places=flags.places, config=build(cls, flags), flags=flags)


def say_help(cls: type, command: Command, *, usage: str, intro: str, epilog: str) -> int:
    """Say what was wanted instead of doing anything; returns the exit code."""
    if "help" in command.flags.switches:
        columns = min(max(shutil.get_terminal_size().columns, 80), 100)
        say(help_text(cls, usage=usage, intro=intro, epilog=epilog, width=columns).rstrip())
    elif "version" in command.flags.switches:
        say(f"hvdtrain {__version__}")
    else:
        say(config_text(build(cls, command.flags)).rstrip())
    return 0
