"""``hvdtrain doctor``: what is installed here, whether it works together, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvdtrain.cli.places import read, say_help
from hvdtrain.cli.voice import say
from hvdtrain.doctor import hosts, launchers, machine, message_passing, software
from hvdtrain.doctor.rows import WRONG, as_json, collected, text
from hvdtrain.settings.options import option, settle

_USAGE = "hvdtrain doctor [FLAG VALUE ...]"
_INTRO = """\
Look at everything that distributed training needs on this machine, and try
two ranks under each launcher that is here. Lines that begin with "!" are
wrong, and say what to do. Takes about half a minute."""
_EPILOG = """\
exit codes:
  0    nothing is wrong
  1    something is
  2    wrong flag"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorWishes:
    """The flags of ``hvdtrain doctor``."""

    json: bool = option(False, "print the rows as JSON", group="how")
    trials: bool = option(True, "try two ranks under each launcher", group="what")
    hosts: str | None = option(
        None, "look at these hosts too, by ssh, and compare", group="what", metavar="A,B", default_text="this one only"
    )

    def __post_init__(self) -> None:
        settle(self)


def run(argv: Sequence[str]) -> int:
    """Looks at everything and prints it.

    Returns:
        0, or 1 if something is wrong.

    Raises:
        ConfigError: A flag is wrong.
    """
    command = read(DoctorWishes, argv, ())
    if command.config is None:
        return say_help(DoctorWishes, command, usage=_USAGE, intro=_INTRO, epilog=_EPILOG)
    wishes: DoctorWishes = command.config
    inspections = [
        ("software", software.rows),
        ("MPI", message_passing.rows),
        ("machine", machine.rows),
        ("launchers", launchers.here),
    ]
    if wishes.trials:
        inspections.append(("launchers", launchers.trials))
    found = list(collected(inspections))
    if wishes.hosts:
        names = wishes.hosts.split(",")
        found += collected([("hosts", lambda: hosts.rows(names, tuple(found)))])
    say(as_json(found) if wishes.json else text(found))
    return int(any(row.verdict == WRONG for row in found))
