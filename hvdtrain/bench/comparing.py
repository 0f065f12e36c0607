"""Which engine is the fastest, as far as some rounds show it. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdtrain.bench.trial import Trial
from hvdtrain.observe.quantities import in_bytes


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
    if rivals:
        sentence += f"; but not in every round: these rounds do not tell it from {', '.join(rivals)} (more --rounds, an idle machine)"
    return Choice(best=best, rivals=rivals, sentence=f"{sentence}.")


def table(trials: Mapping[str, Sequence[Trial]]) -> str:
    """Medians over the rounds, and the spread of the rates."""
    lines = [
        f"{'engine':<10}{'samples/s':>12}{'lowest':>10}{'highest':>10}{'step ms':>10}{'exchange':>10}{'memory':>10}"
    ]
    for engine, of in trials.items():
        rates = [trial.samples_per_second for trial in of]
        step, exchange = (statistics.median(getattr(trial, name) for trial in of) for name in ("step_s", "exchange_s"))
        memory = in_bytes(max(trial.memory_bytes for trial in of))
        lines.append(
            f"{engine:<10}{statistics.median(rates):>12,.0f}{min(rates):>10,.0f}{max(rates):>10,.0f}{step * 1e3:>10.3g}"
            f"{exchange * 1e3:>10.3g}{memory:>10}"
        )
    return "\n".join(lines)


def as_json(trials: Mapping[str, Sequence[Trial]], choice: Choice, **environment: Any) -> dict[str, Any]:
    """All of it, for programs."""
    return {
        "benchmark": "engines",
        **environment,
        "best": choice.best,
        "rivals": list(choice.rivals),
        "rounds": {
            engine: [{name: getattr(trial, name) for name in Trial.__dataclass_fields__} for trial in of]
            for engine, of in trials.items()
        },
    }
