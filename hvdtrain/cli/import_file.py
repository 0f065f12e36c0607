"""``hvdtrain import``: a file of another format as the checkpoint that a new run begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.cli.places import read, say_help
from hvdtrain.cli.voice import say
from hvdtrain.settings.options import option, settle

_USAGE = "hvdtrain import FILE RUN [FLAG VALUE ...]"
_INTRO = """\
Make a model of another program the beginning of a new run, at step 0. FILE is
a safetensors file, one of torch.save, or a folder of
torch.distributed.checkpoint; RUN a run's folder without checkpoints.
  hvdtrain import model.safetensors runs/tuned
  hvdtrain --run-dir runs/tuned --lr 1e-4"""
_EPILOG = """\
exit codes:
  0    written
  1    failed; the message says at what
  2    wrong flag"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportWishes:
    """The flags of ``hvdtrain import``."""

    optimizer: bool = option(True, "take the optimizer's state too, where FILE has one", group="what")
    trusted: bool = option(
        False,
        "nobody else could have written FILE: read a torch or DCP file also with a torch below 2.10, which such a file "
        "can make run code",
        group="what",
    )

    def __post_init__(self) -> None:
        settle(self)


def run(argv: Sequence[str]) -> int:
    """Reads the flags and writes the checkpoint.

    Returns:
        0; every other exit code comes from an exception.

    Raises:
        HvdtrainError: Something is wrong; its ``exit_code`` is the command's.
    """
    command = read(ImportWishes, argv, ("FILE", "RUN"))
    if command.config is None:
        return say_help(ImportWishes, command, usage=_USAGE, intro=_INTRO, epilog=_EPILOG)
    wishes: ImportWishes = command.config
    source, run_dir = command.places
    from hvdtrain.exchange.moving import import_file  # noqa: PLC0415  (torch: seconds)

    moved = import_file(Path(source), Path(run_dir), optimizer=wishes.optimizer, trusted=wishes.trusted)
    also = " and the optimizer's state" if moved.optimizer else ""
    say(f"wrote {moved.path}: {moved.tensors} tensors{also}\nnext: hvdtrain --run-dir {run_dir}")
    return 0
