"""``hvdtrain bench step``: Horovod's synthetic benchmark under each engine, beside DDP and Horovod themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from hvdtrain.bench.spread import Spread
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
from hvdtrain.settings.options import option

_USAGE = "hvdtrain bench step [FLAG VALUE ...]"
_INTRO = """\
Horovod's synthetic benchmark: a training step on random images, timed under
every engine that is here, in turns and anew in each round. Beside them "alone"
(every rank by itself: what is above it is the exchange), plain DDP, plain DDP
over the mpi4py group, and a script on Horovod itself. Its defaults are for GPUs;
on CPUs
  hvdtrain bench step --model mlp --batch-size 16
  hvdtrain bench step --model resnet18 --image-size 64 --batch-size 8 --batches 2"""
_EPILOG = """\
exit codes:
  0    done
  1    something failed, or they do not train alike
  2    wrong flag"""
MODULE = "hvdtrain.bench.step_rank"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWishes(StepFlags):
    """The flags of ``hvdtrain bench step``."""

    ranks: int = option(2, "ranks of each engine", group="what", metavar="N", at_least=1, at_most=1024)
    beside: bool = option(True, "measure alone, DDP and Horovod itself too", group="what")


def run(argv: Sequence[str]) -> int:
    """Reads the flags, measures in turns and says what was found.

    Returns:
        0, or 1 if something failed.

    Raises:
        HvdtrainError: A flag is wrong, or nothing could be measured.
    """
    command = read(StepWishes, argv, ())
    if command.config is None:
        return say_help(StepWishes, command, usage=_USAGE, intro=_INTRO, epilog=_EPILOG)
    wishes: StepWishes = command.config
    out, plot = out_file(wishes.out or "", "step.json"), picture_file(wishes.plot)
    contenders = _contenders(wishes)
    from hvdtrain.bench.energy import find_counters, metered  # noqa: PLC0415  (torch: seconds)
    from hvdtrain.bench.step_models import check_model_name  # noqa: PLC0415
    from hvdtrain.bench.steps import Steps, as_json, read_launch, rows, unlike  # noqa: PLC0415

    check_model_name(wishes.model)
    counters = find_counters()
    steps = Steps(samples=wishes.batch_size * wishes.ranks * wishes.batches, batches=wishes.batches)
    with workplace("bench") as place:
        wish = place / "wish.json"
        wish.write_text(json.dumps(step_wish(wishes)))

        def once(contender: Contender, turn: int) -> str:
            folder = place / f"{contender.name}-{turn}"
            with metered(counters) as meter:
                how = contender_ran(contender, wishes.ranks, MODULE, wish, folder, limit_s=wishes.limit_s())
            if how:
                return how
            try:
                launch = read_launch(folder, wishes.ranks)
            except ConfigError as error:
                return str(error)
            launch = replace(launch, joules=meter.between(launch.began, launch.ended))
            steps.launches.setdefault(contender.name, []).append(launch)
            if not wishes.json:
                rate = steps.samples * len(launch.seconds) / sum(launch.seconds)
                say(f"round {turn + 1}/{wishes.rounds}: {contender.name:<14} {rate:,.1f} samples/s")
            return ""

        failed = in_turns(contenders, wishes.rounds, once, quiet=wishes.json)
    steps.launches = survivors(steps.launches, contenders, failed)
    if not steps.launches:
        raise HvdtrainError("nothing could be measured; hvdtrain doctor says what is wrong here")
    wrong = unlike(steps)
    said = [f"\n{wishes.model}, {wishes.ranks} ranks, {wishes.batch_size} samples each", table(rows(steps)), wrong]
    if counters[1]:
        said.append(f"joules: not readable here: {counters[1]}.")
    known = {
        "world_size": wishes.ranks, "model": wishes.model, "batch_size": wishes.batch_size, "image_size": wishes.image_size,
        "batches": wishes.batches, "warmup": wishes.warmup, "device": wishes.device, "rounds": wishes.rounds, "failed": failed, "unlike": wrong,
        "energy": [counter.name for counter in counters[0]] or counters[1],
    }  # fmt: skip
    conclude(as_json(steps, **environment(), **known), "\n".join(filter(None, said)), out, as_json=wishes.json)
    if plot is not None:
        from hvdtrain.bench.pictures import draw_rates  # noqa: PLC0415  (matplotlib: half a second)

        draw_rates({name: Spread.of(steps.rates(name)) for name in steps.launches}, plot)
    return int(bool(failed or wrong))


def step_wish(wishes: StepFlags) -> dict[str, object]:
    """What the ranks are told.

    Args:
        wishes: Flags that say how steps are timed.
    """
    return {
        "model": wishes.model, "batch_size": wishes.batch_size, "image_size": wishes.image_size, "warmup": wishes.warmup,
        "batches": wishes.batches, "iterations": wishes.iterations, "device": wishes.device,
    }  # fmt: skip


def _contenders(wishes: StepWishes) -> list[Contender]:
    from hvdtrain.bench.steps import ALONE, DDP, DDP_MPI4PY, HOROVOD  # noqa: PLC0415

    _, engines = starters(wishes.engines or "")
    _, everything = starters("")
    found: list[Contender] = []
    if wishes.beside:
        beside = {"torch": (ALONE, DDP), "mpi": (DDP_MPI4PY,), "horovod": (HOROVOD,)}
        for starter in everything:
            if starter.backend == "mpi" and find_spec("mpi4py") is None:
                continue
            found += [Contender(name=name, starter=starter) for name in beside.get(starter.backend, ())]
    return [*found, *(Contender(name=each.backend, starter=each) for each in engines)]
