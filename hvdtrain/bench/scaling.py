"""From steps and all-reduces at some numbers of ranks to a model of the step, its error, and more ranks. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvdtrain.bench.fitting import Fit
from hvdtrain.bench.forms import Cluster, Link, Workload, projections, ring, waited
from hvdtrain.bench.spread import Spread
from hvdtrain.errors import ConfigError

ITEM_BYTES = 4
"""Of a gradient, which is float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled:
    """One engine.

    Attributes:
        steps: Seconds of a step, by the number of ranks; one rank is among them.
        fits: Of its all-reduce, by the number of ranks from 2 on.
        gradient_bytes: Of the model.
        samples: Of a rank and step.
    """

    steps: Mapping[int, Spread]
    fits: Mapping[int, Fit]
    gradient_bytes: int
    samples: int

    @property
    def fit(self) -> Fit:
        """With the most ranks."""
        return self.fits[max(self.fits)]

    @property
    def workload(self) -> Workload:
        """A step of one rank."""
        return Workload(compute_s=self.steps[1].median, gradient_bytes=self.gradient_bytes)

    @property
    def busy_workload(self) -> Workload:
        """A step where a machine has as many ranks as were measured at most: what they take from each other is in it."""
        most = max(self.fits)
        link = self.fit.link
        unhurried_s = self.steps[most].median - waited(self.workload, _cluster(most, most, link, link), ring)
        return replace(self.workload, compute_s=max(self.workload.compute_s, unhurried_s))

    def efficiency(self, ranks: int) -> float:
        """Samples a second to ``ranks`` times those of one rank."""
        return self.steps[1].median / self.steps[ranks].median

    def predicted_s(self, ranks: int) -> float:
        """A step with so many ranks, by the model: one rank's step, and what of a ring is not hidden."""
        link = self.fits[ranks].link if ranks in self.fits else self.fit.link
        return self.workload.compute_s + waited(self.workload, _cluster(ranks, ranks, link, link), ring)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumed:
    """What is projected to.

    Attributes:
        ranks: Their numbers.
        ranks_per_node: Of these on each node.
        link: Between nodes; None: as measured.
        ratio: Of compressed gradients: bytes to bytes sent.
        diloco_steps: Between two exchanges.
    """

    ranks: Sequence[int]
    ranks_per_node: int
    link: Link | None
    ratio: float
    diloco_steps: int


def project(scaled: Scaled, assumed: Assumed) -> dict[str, list[tuple[int, float]]]:
    """Scaling efficiency by form of exchange and number of ranks: of one rank's step to that which is projected.

    The step begins as that of the most ranks that were measured, without what the model says they waited for each other.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    inner = scaled.fit.link
    for ranks in assumed.ranks:
        cluster = _cluster(ranks, assumed.ranks_per_node, assumed.link or inner, inner)
        steps = projections(scaled.busy_workload, cluster, ratio=assumed.ratio, diloco_steps=assumed.diloco_steps)
        for form, seconds in steps.items():
            found.setdefault(form, []).append((ranks, scaled.workload.compute_s / seconds))
    return found


def measured_rows(scaled: Mapping[str, Scaled]) -> list[list[str]]:
    """A table of what was measured, beside what the model says."""
    found = [["engine", "ranks", "samples/s", "step ms", "quartiles", "efficiency", "model ms", "model off"]]
    for engine, each in scaled.items():
        for ranks, seconds in each.steps.items():
            step, model = seconds.scaled(1e3), 1e3 * each.predicted_s(ranks)
            found.append(
                [
                    engine, str(ranks), f"{each.samples * ranks / seconds.median:,.1f}", f"{step.median:.4g}",
                    f"{step.low:.4g}-{step.high:.4g}", f"{100 * each.efficiency(ranks):.0f} %",
                    "" if ranks == 1 else f"{model:.4g}", "" if ranks == 1 else f"{100 * (model / step.median - 1):+.0f} %",
                ]
            )  # fmt: skip
    return found


def fitted_rows(scaled: Mapping[str, Scaled]) -> list[list[str]]:
    """A table of latencies and bandwidths, "-" where the sizes do not show one."""
    found = [["engine", "ranks", "latency us", "GB/s", "error"]]
    for engine, each in scaled.items():
        for ranks, fit in each.fits.items():
            link = fit.link
            found.append(
                [
                    engine,
                    str(ranks),
                    f"{1e6 * link.latency_s:.3g}" if fit.sees_latency else "-",
                    f"{link.bytes_per_s / 1e9:.3g}" if fit.sees_bandwidth else "-",
                    f"{100 * fit.error:.0f} %",
                ]
            )
    return found


def unseen(scaled: Mapping[str, Scaled]) -> list[str]:
    """What a projection lacks, a sentence an engine: a link whose latency or bandwidth the all-reduces do not show."""
    return [
        f"{engine}: with {max(each.fits)} ranks, larger all-reduces took no longer than small ones: the model takes bytes "
        "for free; give a larger --max-bytes"
        if not each.fit.sees_bandwidth
        else f"{engine}: with {max(each.fits)} ranks, small all-reduces show no latency: the model takes messages for free"
        for engine, each in scaled.items()
        if not (each.fit.sees_bandwidth and each.fit.sees_latency)
    ]


def projected_rows(
    projected: Mapping[str, Sequence[tuple[int, float]]], ratio: float, diloco_steps: int
) -> list[list[str]]:
    """A table of scaling efficiencies."""
    named = {"compressed": f"ring, 1/{ratio:g} of the bytes", "diloco": f"DiLoCo, every {diloco_steps} steps"}
    header = ["", *(f"{ranks} ranks" for ranks, _ in next(iter(projected.values())))]
    lines = [
        [named.get(form, form), *(f"{100 * value:.0f} %" for _, value in points)] for form, points in projected.items()
    ]
    return [header, *lines]


def as_json(
    scaled: Mapping[str, Scaled], projected: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], **environment: Any
) -> dict[str, Any]:
    """All of it, for programs."""
    results = {
        engine: {
            "step_seconds": {str(ranks): seconds.as_json() for ranks, seconds in each.steps.items()},
            "efficiency": {str(ranks): each.efficiency(ranks) for ranks in each.steps},
            "model_seconds": {str(ranks): each.predicted_s(ranks) for ranks in each.steps},
            "links": {
                str(ranks): {
                    "latency_s": fit.link.latency_s if fit.sees_latency else None,
                    "bytes_per_s": fit.link.bytes_per_s if fit.sees_bandwidth else None,
                    "error": fit.error,
                }
                for ranks, fit in each.fits.items()
            },
            "projected_efficiency": {
                form: {str(ranks): value for ranks, value in points}
                for form, points in projected.get(engine, {}).items()
            },
        }
        for engine, each in scaled.items()
    }
    return {"benchmark": "scaling", **environment, "results": results}


def numbers_of(flag: str, text: str, *, most: int) -> list[int]:
    """Whole numbers with commas between.

    Raises:
        ConfigError: Something else stands there, or there are more than 16.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not 1 <= len(words) <= 16 or not all(
        word.isascii() and word.isdigit() and len(word) < 9 and 1 <= int(word) <= most for word in words
    ):
        raise ConfigError(f"{flag} {text}: give numbers from 1 to {most} with commas between, at most 16")
    return sorted({int(word) for word in words})


def _cluster(ranks: int, ranks_per_node: int, link: Link, inner: Link) -> Cluster:
    return Cluster(ranks=ranks, ranks_per_node=ranks_per_node, link=link, inner=inner)
