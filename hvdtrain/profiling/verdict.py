"""What binds a step: input, compute, exchange or Python. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_ADVICE = {
    "input": "more --workers, samples that take less work, or data nearer to the host would help",
    "exchange": "fewer bytes (--reduce-dtype bf16, --compression, --accumulate), another engine or algorithm would help",
    "Python": "fewer and larger operations (--compile, larger batches), and less work between them would help; python.txt shows whose it is",
    "compute": "a faster device, --precision bf16 or a smaller model would help; operators.txt shows which operations take it",
}
_WAITS = 0.1  # of a step: more of it is worth a word
_LEAST_HIDDEN = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class RankTimes:
    """Where the time of one rank's step goes, in seconds, means over the profiled steps.

    Attributes:
        rank: Which.
        input: Waiting for samples.
        exchange: Waiting for the exchange of gradients, and so for slower ranks.
        compute: In operations of torch; on a GPU, while it is busy.
        python: The rest: Python, and what it waits for.
        alone: What the exchange takes when nothing else is done; NaN if nothing is exchanged.
    """

    rank: int
    input: float
    exchange: float
    compute: float
    python: float
    alone: float = math.nan

    @property
    def step(self) -> float:
        """The whole step."""
        return self.input + self.exchange + self.compute + self.python


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was found.

    Attributes:
        binds: "input", "compute", "exchange" or "Python".
        sentence: For people.
        rank: The rank that the others wait for: it waits least for the exchange.
        shares: Of its step, of each of the four.
        hidden: The part of the exchange that is hidden behind the backward pass; NaN if nothing is exchanged.
        ranks: All ranks' times.
    """

    binds: str
    sentence: str
    rank: int
    shares: dict[str, float]
    hidden: float
    ranks: tuple[RankTimes, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs; null for what is not known."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
            if name != "ranks"
        } | {
            "ranks": [{k: v if math.isfinite(v) else None for k, v in asdict(each).items()} for each in self.ranks],
        }


def judge(ranks: Sequence[RankTimes]) -> Verdict:
    """Look at the rank that the others wait for; what it waits for the exchange nobody else can shorten."""
    last = min(ranks, key=lambda each: each.exchange)
    parts = {"input": last.input, "compute": last.compute, "exchange": last.exchange, "Python": last.python}
    step = last.step or 1e-12
    binds = max(parts, key=lambda name: parts[name])
    shares = {name: part / step for name, part in parts.items()}
    alone = max((each.alone for each in ranks if math.isfinite(each.alone)), default=math.nan)
    hidden = max(0.0, 1 - last.exchange / alone) if alone > 0 else math.nan
    waits = max(each.exchange for each in ranks) - last.exchange
    who = "" if len(ranks) == 1 else f" of rank {last.rank}"
    if waits > _WAITS * step:
        who += f", for which others wait {waits * 1e3:.3g} ms"
    rest = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if name != binds)
    sentence = (
        f"{binds} binds the step: {parts[binds] * 1e3:.3g} of {step * 1e3:.3g} ms{who} ({rest}). "
        f"{_ADVICE[binds][0].upper()}{_ADVICE[binds][1:]}."
    )
    if math.isfinite(hidden):
        part = f"about {hidden:.0%} of it" if hidden >= _LEAST_HIDDEN else "nothing of it"
        sentence += f" By itself the exchange takes {alone * 1e3:.3g} ms; {part} is hidden behind the backward pass."
    return Verdict(binds=binds, sentence=sentence, rank=last.rank, shares=shares, hidden=hidden, ranks=tuple(ranks))
