"""``hvdtrain bench engines``: which engine trains a task fastest on this machine?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvdtrain.backends.recommended import RECORD, trained_of
from hvdtrain.bench.spread import Spread
from hvdtrain.cli.bench_flags import BenchFlags
from hvdtrain.cli.places import read_both, say_help
from hvdtrain.cli.trials import (
    CONFIG,
    Contender,
    conclude,
    environment,
    in_turns,
    out_file,
    picture_file,
    starters,
    survivors,
    table,
    trained,
    under,
    workplace,
)
from hvdtrain.cli.voice import say
from hvdtrain.errors import ConfigError, HvdtrainError
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.flags import Flags, UsageError, build
from hvdtrain.settings.options import flag_of, option

_USAGE = "hvdtrain bench engines [FLAG VALUE ...] [FLAG OF TRAINING VALUE ...]"
_INTRO = """\
Train a few steps of a task on several ranks of each engine that is here, in
turns and anew in each round, so that a slow minute meets all of them. Say how
fast each was, what of the exchange was waited for, and which to take. Flags of
training say what is trained, as in
  hvdtrain bench engines --task my_module:MyTask --batch-size 32
--config and --print-config are those of training. How long, where and with which
records a --config file trains is left out here."""
_EPILOG = """\
exit codes:
  0    done
  1    an engine failed
  2    wrong flag"""
_FIXED: Mapping[str, Any] = {
    "resume": "never", "epochs": 10**6, "checkpoint_every": 0, "checkpoint_minutes": None, "checkpoint_url": None,
    "logger": "none", "eval_every": 10**6, "profile": None,
}  # fmt: skip
_OURS = (*_FIXED, "max_steps", "log_every", "run_dir", "backend")


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginesWishes(BenchFlags):
    """The flags of ``hvdtrain bench engines`` beside those of training."""

    ranks: int = option(2, "ranks of each engine", group="what", metavar="N", at_least=1, at_most=1024)
    launcher: str | None = option(
        None, "start all engines by this one: torchrun, mpirun, horovodrun", group="what", metavar="NAME",
        default_text="each by its own",
    )  # fmt: skip
    steps: int = option(
        80,
        "optimizer steps of each start, an eighth of them to warm up",
        group="how",
        metavar="N",
        at_least=16,
        at_most=10**6,
    )
    out: str | None = option(
        None, "write everything as JSON; --backend auto:FILE follows it, on this machine, with as many ranks and the same launcher",
        group="where", metavar="FILE", default_text="nowhere",
    )  # fmt: skip


def run(argv: Sequence[str]) -> int:
    """Reads the flags, runs the task in turns and says what was found.

    Returns:
        0, or 1 if some engine failed.

    Raises:
        HvdtrainError: A flag is wrong, or no engine could train the task.
    """
    command, flags = read_both(EnginesWishes, TrainConfig, argv)
    if command.config is None:
        return say_help(EnginesWishes, command, usage=_USAGE, intro=_INTRO, epilog=_EPILOG)
    wishes: EnginesWishes = command.config
    ranks, rounds, steps = wishes.ranks, wishes.rounds, wishes.steps
    _refuse_ours(flags)
    config: TrainConfig = build(TrainConfig, flags)
    out, plot = out_file(wishes.out or "", RECORD), picture_file(wishes.plot)
    wanted = wishes.engines or ""
    tried = under(wishes.launcher, wanted) if wishes.launcher else starters(wanted)[1]
    from hvdtrain.bench.comparing import as_json, choose, rows  # noqa: PLC0415  (the standard library would do, but torch)
    from hvdtrain.bench.energy import find_counters, metered  # noqa: PLC0415
    from hvdtrain.bench.trial import Trial, read_trial  # noqa: PLC0415

    trials: dict[str, list[Trial]] = {}
    counters = find_counters()
    contenders = [Contender(name=each.backend, starter=each) for each in tried]
    whole = replace(config, **_FIXED, max_steps=steps, log_every=max(1, steps // 8))
    with workplace("bench") as place:

        def once(contender: Contender, turn: int) -> str:
            folder = place / f"{contender.name}-{turn}"
            program = ["-m", "hvdtrain", "--config", str(folder / CONFIG)]
            with metered(counters) as meter:
                how = trained(contender.starter, ranks, whole, folder, program, limit_s=wishes.limit_s())
            if how:
                return how
            try:
                trial = read_trial(folder / "run")
            except ConfigError as error:  # the task ended training early
                return str(error)
            trial = replace(trial, joules=meter.between(trial.began, trial.ended))
            trials.setdefault(contender.name, []).append(trial)
            if not wishes.json:
                say(f"round {turn + 1}/{rounds}: {contender.name:<8} {trial.samples_per_second:,.0f} samples/s")
            return ""

        failed = in_turns(contenders, rounds, once, quiet=wishes.json)
    trials = survivors(trials, contenders, failed)
    if not trials:
        raise HvdtrainError("no engine could train the task; hvdtrain doctor says what is wrong here")
    choice = choose(trials)
    said = f"\n{table(rows(trials))}\n\n{choice.sentence}"
    if counters[1]:
        said += f"\njoules: not readable here: {counters[1]}."
    found = as_json(
        trials,
        choice,
        commands={each.name: each.starter.typed(ranks) for each in contenders},
        **environment(),
        world_size=ranks,
        trained=trained_of(config),
        steps=steps,
        failed=failed,
        energy=[counter.name for counter in counters[0]] or counters[1],
    )
    conclude(found, said, out, as_json=wishes.json)
    if plot is not None:
        from hvdtrain.bench.pictures import draw_rates  # noqa: PLC0415  (matplotlib: half a second)

        rates = {name: [trial.samples_per_second for trial in of] for name, of in trials.items()}
        draw_rates({name: Spread.of(of) for name, of in rates.items()}, plot)
    return int(bool(failed))


def _refuse_ours(flags: Flags) -> None:
    """Refuse flags of training that a benchmark has to set itself, and would otherwise ignore.

    Raises:
        UsageError: There is such a flag.
    """
    typed = [name for name in _OURS if name in flags.values]
    if typed:
        remedy = {
            "backend": "--engines says which engines",
            "max_steps": "--steps says how many steps",
            "profile": "give it to hvdtrain train, since what is profiled is slower",
        }.get(typed[0], "leave it out")
        raise UsageError(f"hvdtrain bench engines sets {flag_of(typed[0])} itself; {remedy}")
