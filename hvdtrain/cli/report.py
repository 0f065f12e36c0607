"""``hvdtrain report``: runs as one page and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.cli.places import read, say_help
from hvdtrain.cli.voice import say
from hvdtrain.settings.options import option, settle

_USAGE = "hvdtrain report RUN... [FLAG VALUE ...]"
_INTRO = """\
Draw what runs have written down: loss and metrics, throughput, where the time
of a step goes on each rank, ranks that make the others wait, bytes, memory,
configuration and environment. Several runs are laid over each other. A run may
be going on.
  hvdtrain report runs/digits
  hvdtrain report runs/torch runs/mpi --out compared"""
_EPILOG = """\
exit codes:
  0    report.html and a PNG for each picture are written
  1    failed; the message says at what
  2    wrong flag or folder"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportWishes:
    """The flags of ``hvdtrain report``."""

    out: str | None = option(
        None,
        "folder to write into",
        group="where",
        metavar="DIR",
        default_text="RUN/report, or report for several runs",
    )

    metrics: str | None = option(
        None, "names of metrics to draw, * and ? stand for signs", group="what", metavar="A,B*",
        default_text="the loss and the first 24",
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)


def run(argv: Sequence[str]) -> int:
    """Reads the flags and writes the report.

    Returns:
        0; every other exit code comes from an exception.

    Raises:
        HvdtrainError: Something is wrong; its ``exit_code`` is the command's.
    """
    command = read(ReportWishes, argv, ("RUN...",))
    if command.config is None:
        return say_help(ReportWishes, command, usage=_USAGE, intro=_INTRO, epilog=_EPILOG)
    wishes: ReportWishes = command.config
    from hvdtrain.report.making import make_report  # noqa: PLC0415  (half a second that a wrong flag should not cost)

    path = make_report(
        [Path(place) for place in command.places],
        None if wishes.out is None else Path(wishes.out),
        metrics=None if wishes.metrics is None else wishes.metrics.split(","),
    )
    say(f"wrote {path}, and a PNG of each picture beside it")
    return 0
