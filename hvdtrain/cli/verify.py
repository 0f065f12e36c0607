"""``hvdtrain verify``: is a task trained alike in one process and on several ranks of each engine?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hvdtrain.cli.places import read_both, say_help
from hvdtrain.cli.trials import CONFIG, EngineFlags, starters, trained, workplace
from hvdtrain.cli.voice import say
from hvdtrain.errors import HvdtrainError
from hvdtrain.launch.starting import Starter
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.flags import Flags, UsageError, build
from hvdtrain.settings.options import option

_USAGE = "hvdtrain verify --task MODULE.TASK [FLAG VALUE ...] [FLAG OF TRAINING VALUE ...]"
_INTRO = """\
Train a few steps of a task in one process (twice) and on several ranks of each
engine that is here, on CPUs, with the same seed and the same global batches.
Compare the data, losses, gradients, buffers and parameters; name the first
difference and its likely cause. Flags of training count here too; --config and
--print-config are those of training.
Numbers are compared in float64 unless --precision says otherwise. Dropout is
switched off: its numbers are meant to be each rank's own."""
_EPILOG = """\
exit codes:
  0    all are alike
  1    something differs or a run failed
  2    wrong flag"""
_LIMIT_S = 600.0
_GLOBAL_BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyWishes(EngineFlags):
    """The flags of ``hvdtrain verify`` beside those of training."""

    ranks: int = option(2, "ranks of each engine", group="what", metavar="N", at_least=1, at_most=1024)
    steps: int = option(3, "optimizer steps", group="what", metavar="N", at_least=1, at_most=1024)


def run(argv: Sequence[str]) -> int:
    """Reads the flags, runs the task and says what differs.

    Returns:
        0 if nothing does, else 1.

    Raises:
        HvdtrainError: A flag is wrong, or the task does not run in one process.
    """
    command, flags = read_both(VerifyWishes, TrainConfig, argv)
    if command.config is None:
        return say_help(VerifyWishes, command, usage=_USAGE, intro=_INTRO, epilog=_EPILOG)
    wishes: VerifyWishes = command.config
    ranks, steps = wishes.ranks, wishes.steps
    config = _config(flags, ranks, steps)
    from hvdtrain.verify.comparing import Finding, between, tolerance, twice, uncompared  # noqa: PLC0415  (torch: seconds)
    from hvdtrain.verify.notes import read  # noqa: PLC0415

    close = tolerance(config.precision)
    with workplace("verify") as place:
        alone, others = starters(wishes.engines or "")
        for name in ("one", "again"):
            failed = _trained(alone, 1, config, place / name)
            if failed:
                raise HvdtrainError(f"the task fails in one process already: {failed}")
        one, again = read(place / "one"), read(place / "again")

        def tell(label: str, found: Sequence[Finding]) -> None:
            for each in found:
                say(f"{label}: {each.where}: {each.what}\n    {each.cause}")

        unsteady = list(twice(one, again, close=close))
        tell("one process, twice", unsteady)
        wrong = bool(unsteady)
        for starter in others:
            label = f"{starter.backend} ({starter.name}, {ranks} ranks)"
            folder = place / starter.name.replace(" ", "")
            failed = _trained(starter, ranks, config, folder)
            ranks_notes = [] if failed else read(folder)
            found = [] if failed else list(between(one, ranks_notes, close=close))
            drawn = "" if failed else uncompared(one, ranks_notes)
            wrong |= bool(failed or found)
            if failed:
                say(f"{label}: failed: {failed}")
            elif drawn and not found:
                say(
                    f"{label}: all ranks have the same model after {steps} steps; not compared with one process:\n    {drawn}"
                )
            elif not found:
                say(f"{label}: as in one process, {steps} steps, within {close:g}")
            tell(label, found)
        if one[0].dropouts:
            say(f"dropout was switched off in {len(one[0].dropouts)} layers")
    return int(wrong)


def _config(flags: Flags, ranks: int, steps: int) -> TrainConfig:
    config: TrainConfig = build(TrainConfig, flags)
    if config.task is None:
        raise UsageError("verify needs --task MODULE.TASK, the task to be tried (docs/training.md says what one is)")
    if config.compression != "none" or config.sync != "every-step":
        raise UsageError(
            "verify compares with one process, and not with what --compression and --sync change on purpose; leave them out"
        )
    precision = config.precision if "precision" in flags.values else "fp64"
    batch = config.global_batch_size
    if batch is None:
        given = "batch_size" in flags.values and config.batch_size is not None
        batch = config.batch_size * config.accumulate * ranks if given and config.batch_size else _GLOBAL_BATCH
    return replace(
        config, precision=precision, global_batch_size=batch, batch_size=None, epochs=10**6, max_steps=steps, device="cpu",
        checkpoint_every=0, resume="never", backend="auto", workers=0,
    )  # fmt: skip


def _trained(starter: Starter, ranks: int, config: TrainConfig, folder: Path) -> str:
    """Train under a launcher; returns how it failed, or ""."""
    program = ["-m", "hvdtrain.verify.rank", str(folder / CONFIG), str(folder)]
    return trained(starter, ranks, config, folder, program, limit_s=_LIMIT_S)
