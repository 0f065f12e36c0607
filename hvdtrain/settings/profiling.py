"""Which steps are profiled: ``--profile 10:20``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hvdtrain.errors import ConfigError
from hvdtrain.settings.wording import shown

MOST_STEPS = 500
"""A trace has thousands of events a step, and is a file that a browser has to open."""


@dataclass(frozen=True, slots=True)
class ProfiledSteps:
    """The first and the last one, counted from 1 over the whole run."""

    first: int
    last: int


def steps_of(text: str | None) -> ProfiledSteps | None:
    """What ``--profile`` says; None for nothing.

    Raises:
        ConfigError: It is no such range.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", text)
    if found is None:
        raise ConfigError(f"--profile {shown(text)}: give the first and the last step, as in --profile 10:20")
    first, last = map(int, found.groups())
    if not 1 <= first <= last:
        raise ConfigError(f"--profile {text}: steps are counted from 1, and the last one is not before the first")
    if last - first >= MOST_STEPS:
        raise ConfigError(
            f"--profile {text} is {last - first + 1} steps, a trace that nobody can open; give at most {MOST_STEPS}"
        )
    return ProfiledSteps(first, last)
