"""The flags that benchmarks have in common."""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.cli.trials import EngineFlags
from hvdtrain.errors import ConfigError
from hvdtrain.settings.options import MOST_SECONDS, option

_LIMIT_S = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchFlags(EngineFlags):
    """What every benchmark can be told: whom to measure, how often, and where to write."""

    rounds: int = option(3, "how often each is started", group="how", metavar="N", at_least=1, at_most=1000)
    limit: float | None = option(
        None, "most time of each start: 90s, 30m, 2h", group="how", metavar="TIME", duration=True, above=0,
        at_most=MOST_SECONDS, default_text="1h, and more where others ask for more",
    )  # fmt: skip
    json: bool = option(False, "print JSON instead of tables", group="where")
    out: str | None = option(
        None, "write everything as JSON into this file", group="where", metavar="FILE", default_text="nowhere"
    )
    plot: str | None = option(
        None, "draw samples per second, .png or .svg", group="where", metavar="FILE", default_text="nothing"
    )

    def __post_init__(self) -> None:
        EngineFlags.__post_init__(self)
        if self.out is not None and self.out == self.plot:
            raise ConfigError(f"--out and --plot are one file, {self.out}; give two")

    def limit_s(self, needed_s: float = 0.0) -> float:
        """Seconds that a start may take.

        Args:
            needed_s: What the other flags add up to.
        """
        return max(_LIMIT_S, needed_s) if self.limit is None else self.limit


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlags(BenchFlags):
    """How a step is timed."""

    model: str = option("resnet50", "mlp, small, many, or a classifier of torchvision", group="what", metavar="NAME")
    batch_size: int = option(32, "samples of each rank and step", group="what", metavar="N", at_least=1, at_most=2**20)
    image_size: int = option(
        224, "height and width of torchvision's images", group="what", metavar="N", at_least=8, at_most=4096
    )
    device: str = option("auto", "where", group="what", choices=("auto", "cpu", "cuda"))
    warmup: int = option(
        10, "steps before the first that is timed", group="how", metavar="N", at_least=0, at_most=10**6
    )
    batches: int = option(10, "steps that are timed together", group="how", metavar="N", at_least=1, at_most=10**6)
    iterations: int = option(10, "so many times in each start", group="how", metavar="N", at_least=1, at_most=10**6)
