"""Which metrics of evaluations are drawn. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from hvdtrain.errors import ConfigError
from hvdtrain.report.reading import Run
from hvdtrain.settings.wording import did_you_mean

MOST = 24
"""So many are drawn where nobody chose: a page of a thousand pictures is read by nobody."""
PREFIX = "eval_"
_NAMED = 12


def chosen_metrics(runs: Sequence[Run], asked: Sequence[str] | None) -> tuple[list[str], str]:
    """The metrics to draw, as records name them, in the order of their names; and a sentence on those that are left out, or "".

    Args:
        runs: Whose evaluations.
        asked: Names without "eval_", as `fnmatch` has them; None for the first `MOST`.

    Raises:
        ConfigError: No metric has such a name.
    """
    every = sorted(
        {name for run in runs for record in run.evaluations for name in record if name.startswith(PREFIX)}
        - {"eval_loss"}
    )
    if asked is None:
        left = [name.removeprefix(PREFIX) for name in every[MOST:]]
        if not left:
            return every, ""
        named = ", ".join(left[:_NAMED]) + (f" and {len(left) - _NAMED} more" if len(left) > _NAMED else "")
        return every[:MOST], (
            f"{MOST} of {len(every)} metrics are drawn, and these are not: {named}; hvdtrain report --metrics NAME,NAME* draws those"
        )
    patterns = [each.strip().removeprefix(PREFIX) for each in asked if each.strip()]
    short = {name: name.removeprefix(PREFIX) for name in every}
    for pattern in patterns:
        if pattern != "loss" and not any(fnmatchcase(name, pattern) for name in short.values()):
            known = ", ".join([*short.values()][:_NAMED]) or "none"
            raise ConfigError(
                f"--metrics {pattern}: no evaluation has such a metric{did_you_mean(pattern, list(short.values()))} There are {known}"
                f"{' and more' if len(every) > _NAMED else ''}"
            )
    return [name for name in every if any(fnmatchcase(short[name], pattern) for pattern in patterns)], ""
