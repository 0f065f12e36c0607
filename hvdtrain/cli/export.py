"""``hvdtrain export``: a checkpoint's model, and optimizer, as a file of another format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.cli.places import read, say_help
from hvdtrain.cli.voice import say
from hvdtrain.settings.options import option, settle

_USAGE = "hvdtrain export RUN|CHECKPOINT OUT [FLAG VALUE ...]"
_INTRO = """\
Write the model of a checkpoint as a file of another format, bit for bit.
RUN is a run's folder, whose newest whole checkpoint is taken; the run may be
going on. OUT must not exist: a file, or a folder for --format dcp.
  hvdtrain export runs/digits model.safetensors
  hvdtrain export runs/digits/checkpoints/step-00000120 both.pt --format torch --optimizer"""
_EPILOG = """\
formats:
  safetensors  the model's tensors by name
  torch        torch.save of the model's state_dict; with --optimizer of
               {"model": ..., "optimizer": ..., "optimizer_class": ...}
  dcp          a folder of torch.distributed.checkpoint, of the same

exit codes:
  0    written
  1    failed; the message says at what
  2    wrong flag"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportWishes:
    """The flags of ``hvdtrain export``."""

    format: str = option("safetensors", "what to write", group="what", choices=("safetensors", "torch", "dcp"))
    optimizer: bool = option(False, "the optimizer's state too (torch, dcp)", group="what")

    def __post_init__(self) -> None:
        settle(self)


def run(argv: Sequence[str]) -> int:
    """Reads the flags and writes the file.

    Returns:
        0; every other exit code comes from an exception.

    Raises:
        HvdtrainError: Something is wrong; its ``exit_code`` is the command's.
    """
    command = read(ExportWishes, argv, ("RUN|CHECKPOINT", "OUT"))
    if command.config is None:
        return say_help(ExportWishes, command, usage=_USAGE, intro=_INTRO, epilog=_EPILOG)
    wishes: ExportWishes = command.config
    source, out = command.places
    from hvdtrain.exchange.moving import export_checkpoint  # noqa: PLC0415  (torch: seconds)

    moved = export_checkpoint(Path(source), Path(out), form=wishes.format, optimizer=wishes.optimizer)
    also = " and the optimizer's state" if moved.optimizer else ""
    say(f"wrote {moved.path}: {moved.tensors} tensors{also} of {moved.source}")
    return 0
