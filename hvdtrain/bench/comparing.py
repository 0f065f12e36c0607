"""Which engine is the fastest, as far as some rounds show it. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdtrain.bench.trial import Trial
from hvdtrain.observe.quantities import in_bytes

FEWEST_ROUNDS = 3
"""That one of two equal engines wins all of them by chance is then no more than a quarter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What rounds of trials come to.

    Attributes:
        best: The engine of the highest median rate.
        rivals: Engines that were as fast or faster in some round: the rounds do not tell these apart from it.
        sentence: For people.
    """

    best: str
    rivals: tuple[str, ...]
    sentence: str


def choose(trials: Mapping[str, Sequence[Trial]]) -> Choice:
    """Choose by samples per second.

    Args:
        trials: Of each engine, in the order of the rounds; at least one each.
    """
    rates = {engine: [trial.samples_per_second for trial in of] for engine, of in trials.items()}
    medians = {engine: statistics.median(of) for engine, of in rates.items()}
    best = max(medians, key=lambda engine: medians[engine])
    others = sorted((engine for engine in medians if engine != best), key=lambda engine: -medians[engine])
    rivals = tuple(
        engine
        for engine in others
        if any(theirs >= own for own, theirs in zip(rates[best], rates[engine], strict=False))
    )
    sentence = f"{best} is the fastest: {medians[best]:,.0f} samples/s"
    if others:
        factors = ", ".join(f"{medians[best] / medians[engine]:.2f} times {engine}" for engine in others)
        sentence += f", {factors}"
    rounds = min(len(of) for of in rates.values())
    if others and not rivals and rounds < FEWEST_ROUNDS:
        sentence += f"; but {'one round says' if rounds == 1 else 'two rounds say'} little (more --rounds)"
    if rivals:
        sentence += f"; but not in every round: these rounds do not tell it from {', '.join(rivals)} (more --rounds, an idle machine)"
    return Choice(best=best, rivals=rivals, sentence=f"{sentence}.")


def rows(trials: Mapping[str, Sequence[Trial]]) -> list[list[str]]:
    """A table: the header, then medians over the rounds with the spread of the rates."""
    found = [["engine", "samples/s", "lowest", "highest", "step ms", "exchange", "memory", "J/sample"]]
    for engine, of in trials.items():
        rates = [trial.samples_per_second for trial in of]
        step, exchange = (statistics.median(getattr(trial, name) for trial in of) for name in ("step_s", "exchange_s"))
        joules = [trial.joules / trial.samples for trial in of if trial.joules is not None]
        found.append(
            [
                engine,
                *(f"{rate:,.0f}" for rate in (statistics.median(rates), min(rates), max(rates))),
                f"{step * 1e3:.3g}",
                f"{exchange * 1e3:.3g}",
                in_bytes(max(trial.memory_bytes for trial in of)),
                f"{statistics.median(joules):.3g}" if joules else "",
            ]
        )
    return found if any(row[-1] for row in found[1:]) else [row[:-1] for row in found]


def as_json(
    trials: Mapping[str, Sequence[Trial]], choice: Choice, *, commands: Mapping[str, str], **environment: Any
) -> dict[str, Any]:
    """All of it, for programs and for ``--backend auto:RUN``.

    Args:
        trials: As for `choose`.
        choice: What it said.
        commands: How each engine's launcher was called, up to the program.
        environment: What else is to be told.
    """
    return {
        "benchmark": "engines",
        **environment,
        "best": choice.best,
        "rivals": list(choice.rivals),
        "launches": {
            engine: {
                "launcher": of[-1].launcher,
                "command": commands.get(engine, ""),
                "device": of[-1].device.partition(":")[0],
            }
            for engine, of in trials.items()
        },
        "rounds": {
            engine: [{name: _plain(getattr(trial, name)) for name in Trial.__dataclass_fields__} for trial in of]
            for engine, of in trials.items()
        },
    }


def _plain(value: Any) -> Any:
    """JSON proper has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
