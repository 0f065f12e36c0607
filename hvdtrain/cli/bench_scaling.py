"""``hvdtrain bench scaling``: 1, 2, 4, ... ranks of each engine, and what a model of the exchange says of more."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.bench.bandwidth import size_of, sizes
from hvdtrain.bench.collectives import Measured, read_times
from hvdtrain.bench.fitting import FEWEST_SIZES, fit_ring
from hvdtrain.bench.forms import Link
from hvdtrain.bench.scaling import (
    ITEM_BYTES,
    Assumed,
    Scaled,
    as_json,
    fitted_rows,
    measured_rows,
    numbers_of,
    project,
    projected_rows,
    unseen,
)
from hvdtrain.bench.spread import Spread
from hvdtrain.cli import bench_collectives, bench_step
from hvdtrain.cli.bench_flags import StepFlags
from hvdtrain.cli.places import read, say_help
from hvdtrain.cli.trials import (
    Contender,
    conclude,
    contender_ran,
    environment,
    in_turns,
    out_file,
    picture_file,
    starters,
    survivors,
    table,
    workplace,
)
from hvdtrain.cli.voice import say
from hvdtrain.errors import ConfigError, HvdtrainError
from hvdtrain.settings.flags import UsageError
from hvdtrain.settings.options import option

_USAGE = "hvdtrain bench scaling [FLAG VALUE ...]"
_INTRO = """\
The step of hvdtrain bench step with 1, 2, 4, ... ranks of each engine, in turns
and anew in each round, and all-reduces of many sizes, out of which latency and
bandwidth are fitted. --project says what they come to with more ranks, under
each form of exchange (docs/concepts.md has the formulas). The link between
nodes is the one that was measured here, unless --link-gbit says otherwise.
  hvdtrain bench scaling --model mlp --batch-size 16 --project 64,512,4096 \\
    --link-gbit 25 --link-us 10 --ranks-per-node 4"""
_EPILOG = """\
exit codes:
  0    done
  1    something failed
  2    wrong flag"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingWishes(StepFlags):
    """The flags of ``hvdtrain bench scaling``."""

    ranks: str | None = option(
        None, "numbers of ranks", group="what", metavar="N,N", default_text="1, 2, 4, ... up to the CPUs"
    )
    device: str = option("cpu", "where", group="what", choices=("cpu", "cuda"))  # all-reduces need it said
    max_bytes: str = option("64M", "largest all-reduce: bytes, or 64K, 16M, 1G", group="what", metavar="BYTES")
    seconds: float = option(
        0.05, "for each size of all-reduce, of each start", group="how", metavar="S", above=0, at_most=60
    )
    project: str | None = option(
        None, "numbers of ranks to project to", group="projection", metavar="N,N", default_text="nothing"
    )
    ranks_per_node: int | None = option(
        None,
        "of these on each node",
        group="projection",
        metavar="N",
        at_least=1,
        at_most=1024,
        default_text="as measured",
    )
    link_gbit: float | None = option(
        None, "bandwidth between nodes, Gbit/s", group="projection", metavar="X", above=0, default_text="as measured"
    )
    link_us: float | None = option(
        None,
        "latency between nodes, microseconds",
        group="projection",
        metavar="X",
        above=0,
        default_text="as measured",
    )
    ratio: float = option(16.0, "bytes to bytes sent, when compressed", group="projection", metavar="X", at_least=1)
    diloco_steps: int = option(100, "steps between exchanges of DiLoCo", group="projection", metavar="N", at_least=1)
    plot: str | None = option(
        None, "draw efficiency by ranks, .png or .svg", group="where", metavar="FILE", default_text="nothing"
    )

    def __post_init__(self) -> None:
        StepFlags.__post_init__(self)
        if len(sizes(size_of("--max-bytes", self.max_bytes))) < FEWEST_SIZES:
            raise ConfigError(f"--max-bytes {self.max_bytes}: latency and bandwidth need three sizes; give 16 or more")
        if 1 not in self.numbers or max(self.numbers) == 1:
            raise ConfigError(
                f"--ranks {self.ranks}: one rank is what others are compared with; give 1 and more, as in 1,2,4"
            )
        if self.project is not None:
            numbers_of("--project", self.project, most=10**7)

    @property
    def numbers(self) -> list[int]:
        """Of ranks."""
        if self.ranks is not None:
            return numbers_of("--ranks", self.ranks, most=1024)
        return [2**power for power in range(max((os.cpu_count() or 1).bit_length(), 2))]


def run(argv: Sequence[str]) -> int:
    """Reads the flags, measures in turns and says what was found.

    Returns:
        0, or 1 if something failed.

    Raises:
        HvdtrainError: A flag is wrong, or nothing could be measured.
    """
    command = read(ScalingWishes, argv, ())
    if command.config is None:
        return say_help(ScalingWishes, command, usage=_USAGE, intro=_INTRO, epilog=_EPILOG)
    wishes: ScalingWishes = command.config
    out, plot = out_file(wishes.out or "", "scaling.json"), picture_file(wishes.plot)
    if plot is not None and wishes.project is None:
        raise UsageError("--plot draws a projection; give --project too")
    assumed = _assumed(wishes)
    _, engines = starters(wishes.engines or "")
    from hvdtrain.bench.step_models import check_model_name, gradient_bytes  # noqa: PLC0415  (torch: seconds)

    check_model_name(wishes.model)
    contenders = [Contender(name=each.backend, starter=each) for each in engines]
    sampled, failed = _measure(wishes, contenders)
    bytes_of_model = gradient_bytes(wishes.model, ITEM_BYTES)
    scaled = {
        name: sampled.scaled(name, bytes_of_model, wishes.batch_size)
        for name in survivors(sampled.steps, contenders, failed)
    }
    if not scaled:
        raise HvdtrainError("nothing could be measured; hvdtrain doctor says what is wrong here")
    said = [
        f"\n{wishes.model}, {wishes.batch_size} samples a rank, {bytes_of_model / 1e6:,.1f} MB of gradients",
        table(measured_rows(scaled)),
        "\nfitted to all-reduces as a ring, with the error of sizes that were left out",
        table(fitted_rows(scaled)),
        *unseen(scaled),
    ]
    projected = {engine: project(each, assumed) for engine, each in scaled.items()} if assumed.ranks else {}
    for engine, forms in projected.items():
        said += [
            f"\nscaling efficiency projected for {engine}",
            table(projected_rows(forms, wishes.ratio, wishes.diloco_steps)),
        ]
    known = {
        "model": wishes.model, "batch_size": wishes.batch_size, "image_size": wishes.image_size, "rounds": wishes.rounds,
        "batches": wishes.batches, "warmup": wishes.warmup, "device": wishes.device, "world_sizes": wishes.numbers,
        "gradient_bytes": bytes_of_model, "ranks_per_node": assumed.ranks_per_node, "link_gbit": wishes.link_gbit,
        "link_us": wishes.link_us, "ratio": wishes.ratio, "diloco_steps": wishes.diloco_steps, "failed": failed,
    }  # fmt: skip
    conclude(as_json(scaled, projected, **environment(), **known), "\n".join(said), out, as_json=wishes.json)
    if plot is not None:
        from hvdtrain.bench.pictures import draw_scaling  # noqa: PLC0415  (matplotlib: half a second)

        measured = {name: [(ranks, each.efficiency(ranks)) for ranks in each.steps] for name, each in scaled.items()}
        draw_scaling(projected, measured, plot)
    return int(bool(failed))


class _Samples:
    """Times of all launches."""

    def __init__(self, batches: int) -> None:
        self._batches = batches
        self.steps: dict[str, dict[int, list[float]]] = {}
        self._reduced: dict[int, Measured] = {}

    def add_steps(self, engine: str, ranks: int, seconds: Sequence[float]) -> None:
        own = self.steps.setdefault(engine, {}).setdefault(ranks, [])
        own += [each / self._batches for each in seconds]

    def add_reduced(self, engine: str, ranks: int, folder: Path) -> None:
        self._reduced.setdefault(ranks, Measured(ranks=ranks)).add(engine, read_times(folder, ranks))

    def scaled(self, engine: str, gradient_bytes: int, samples: int) -> Scaled:
        fits = {}
        for ranks, measured in sorted(self._reduced.items()):
            by_size = measured.times[engine]["all-reduce"]
            fits[ranks] = fit_ring([(size, Spread.of(of).median) for size, of in by_size.items()], ranks)
        steps = {ranks: Spread.of(of) for ranks, of in sorted(self.steps[engine].items())}
        return Scaled(steps=steps, fits=fits, gradient_bytes=gradient_bytes, samples=samples)


def _measure(wishes: ScalingWishes, contenders: Sequence[Contender]) -> tuple[_Samples, dict[str, str]]:
    from hvdtrain.bench.steps import read_launch  # noqa: PLC0415  (torch: seconds)

    sampled = _Samples(wishes.batches)
    with workplace("bench") as place:
        step, reduce = place / "step.json", place / "reduce.json"
        step.write_text(json.dumps(bench_step.step_wish(wishes)))
        asked = {
            "sizes": sizes(size_of("--max-bytes", wishes.max_bytes)), "collectives": ["all-reduce"],
            "seconds": wishes.seconds, "device": wishes.device,
        }  # fmt: skip
        reduce.write_text(json.dumps(asked))

        def once(contender: Contender, turn: int) -> str:
            for ranks in wishes.numbers:
                folder = place / f"{contender.name}-{ranks}-{turn}"
                how = contender_ran(contender, ranks, bench_step.MODULE, step, folder, limit_s=wishes.limit_s())
                if how:
                    return f"with {ranks} ranks: {how}"
                reduced = folder.with_name(f"{folder.name}-reduced")
                if ranks > 1:
                    how = contender_ran(
                        contender, ranks, bench_collectives.MODULE, reduce, reduced, limit_s=wishes.limit_s()
                    )
                if how:
                    return f"all-reduces with {ranks} ranks: {how}"
                try:
                    launch = read_launch(folder, ranks)
                    if ranks > 1:
                        sampled.add_reduced(contender.name, ranks, reduced)
                except ConfigError as error:
                    return str(error)
                sampled.add_steps(contender.name, ranks, launch.seconds)
                if not wishes.json:
                    rate = wishes.batch_size * ranks * wishes.batches * len(launch.seconds) / sum(launch.seconds)
                    say(f"round {turn + 1}/{wishes.rounds}: {contender.name:<8} {ranks} ranks {rate:,.1f} samples/s")
            return ""

        failed = in_turns(contenders, wishes.rounds, once, quiet=wishes.json)
    return sampled, failed


def _assumed(wishes: ScalingWishes) -> Assumed:
    link = None
    if (wishes.link_gbit is None) != (wishes.link_us is None):
        raise UsageError("--link-gbit and --link-us describe one link; give both, or none")
    if wishes.link_gbit is not None and wishes.link_us is not None:
        link = Link(latency_s=wishes.link_us / 1e6, bytes_per_s=wishes.link_gbit * 1e9 / 8)
    return Assumed(
        ranks=[] if wishes.project is None else numbers_of("--project", wishes.project, most=10**7),
        ranks_per_node=wishes.ranks_per_node or max(wishes.numbers),
        link=link,
        ratio=wishes.ratio,
        diloco_steps=wishes.diloco_steps,
    )
