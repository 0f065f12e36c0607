"""What commands that try a task under several engines have in common: their own flags beside those of training, launchers, and a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hvdtrain.doctor.asking import ask
from hvdtrain.doctor.launchers import here_with_horovod
from hvdtrain.launch.starting import Starter, surroundings
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.flags import UsageError, config_text

CONFIG = "config.yaml"


def own_flags(argv: Sequence[str], defaults: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The values of a command's own flags, and the words that are not its own.

    Raises:
        UsageError: One has no value.
    """
    own, rest, words = dict(defaults), [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in own:
            rest.append(word)
        elif equals:
            own[name] = value
        else:
            found = next(words, None)
            if found is None:
                raise UsageError(f"{name} needs a value; --help shows which")
            own[name] = found
    return own, rest


def count(name: str, text: str) -> int:
    """A flag's number.

    Raises:
        UsageError: It is none, or too large.
    """
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:6]) <= 1024 or len(text) > 4:
        raise UsageError(f"{name} {text}: give a number from 1 to 1024")
    return int(text)


def starters(engines: str) -> tuple[Starter, list[Starter]]:
    """One process, and a launcher for each engine that is wanted, or that is here: Horovod's first.

    Raises:
        UsageError: One that is wanted is not here.
    """
    here: dict[str, Starter] = {}
    for starter in here_with_horovod():
        here.setdefault(starter.backend, starter)
    wanted = [name.strip() for name in engines.split(",") if name.strip()] or [name for name in here if name != "local"]
    unknown = [name for name in wanted if name not in here or name == "local"]
    if unknown:
        raise UsageError(
            f"--engines {unknown[0]}: those that are here are {', '.join(n for n in here if n != 'local')}; hvdtrain doctor says why"
        )
    return here["local"], [here[name] for name in dict.fromkeys(wanted)]


def trained(
    starter: Starter, ranks: int, config: TrainConfig, folder: Path, program: Sequence[str], *, limit_s: float
) -> str:
    """Train under a launcher; returns how it failed, or "".

    Args:
        starter: The launcher, and the engine.
        ranks: How many.
        config: What to train; the run's folder becomes ``folder / "run"``.
        folder: Is made; the configuration is written to `CONFIG` in it.
        program: What each rank runs: words for Python.
        limit_s: Seconds that it may take.
    """
    folder.mkdir()
    whole = replace(config, run_dir=str(folder / "run"), backend=starter.backend)
    (folder / CONFIG).write_text(config_text(whole))
    answer = ask(starter.command(ranks, program), limit_s=limit_s, environment=surroundings(os.environ))
    return answer.how if answer.code else ""
