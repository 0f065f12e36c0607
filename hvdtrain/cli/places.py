"""How subcommands read their words: flags, and where they name files such as ``hvdtrain export RUN OUT``, those too."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvdtrain.cli.voice import say
from hvdtrain.settings.flags import Flags, UsageError, build, config_text, help_text, read_flags
from hvdtrain.settings.options import options_of
from hvdtrain.version import __version__

_MOST_WORDS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command line that was read.

    Attributes:
        places: The words that belong to no flag, in their order.
        config: The options; None if only help, the version or the configuration is wanted.
        flags: As they were typed.
        printed: What ``--print-config`` prints: options, and the flags that were typed of them.
    """

    places: tuple[str, ...]
    config: Any
    flags: Flags
    printed: tuple[type, Flags]


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
        return Command(places=(), config=None, flags=flags, printed=(cls, flags))
    if len(flags.places) < len(names):
        missing = names[len(flags.places)].removesuffix("...")
        raise UsageError(f"{missing} is missing; --help shows what to give")
    return Command(places=flags.places, config=build(cls, flags), flags=flags, printed=(cls, flags))


def read_both(cls: type, training: type, argv: Sequence[str]) -> tuple[Command, Flags]:
    """Read the flags of a command, and among them those of what it trains, which may have a ``--config``.

    Args:
        cls: The command's own options; these names are its own.
        training: The options of what is trained.
        argv: What was typed.

    Returns:
        The command, whose ``config`` is None if only help, the version or the configuration of the training is wanted; and the
        flags of the training.

    Raises:
        UsageError: A flag is wrong.
    """
    kinds = {entry.flag: entry.kind for entry in options_of(cls)}
    negatives = {f"--no-{flag[2:]}" for flag, kind in kinds.items() if kind is bool}
    own: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        typed, equals, _ = word.partition("=")
        flag = typed.replace("_", "-")
        if flag not in kinds and flag not in negatives:
            rest.append(word)
            continue
        own.append(word)
        if not equals and flag in kinds and kinds[flag] is not bool:
            own += [following for following in (next(words, None),) if following is not None]
    command, flags = read(cls, own, ()), read_flags(training, rest)
    if flags.switches:
        command = replace(command, config=None, flags=replace(command.flags, switches=flags.switches))
    return replace(command, printed=(training, flags)), flags


def say_help(cls: type, command: Command, *, usage: str, intro: str, epilog: str) -> int:
    """Say what was wanted instead of doing anything; returns the exit code.

    Args:
        cls: The command's options.
        command: What was typed.
        usage: Of the help.
        intro: See ``usage``.
        epilog: See ``usage``.
    """
    if "help" in command.flags.switches:
        columns = min(max(shutil.get_terminal_size().columns, 80), 100)
        say(help_text(cls, usage=usage, intro=intro, epilog=epilog, width=columns).rstrip())
    elif "version" in command.flags.switches:
        say(f"hvdtrain {__version__}")
    else:
        say(config_text(build(*command.printed)).rstrip())
    return 0
