"""From wishes to a Horovod that was seen to work: find or build the wheel, install it, try it on two ranks."""

from __future__ import annotations

import importlib
import json
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.backends.hvd import stamp as horovod_stamp
from hvdtrain.backends.hvd.stamp import Stamp
from hvdtrain.horovod_build import source, wheels
from hvdtrain.horovod_build.compiling import build_environment, compile_wheel, fetch_tools
from hvdtrain.horovod_build.failure import BuildError
from hvdtrain.horovod_build.plan import Layout, Plan, decide
from hvdtrain.horovod_build.private_folder import make_private
from hvdtrain.horovod_build.probe import machine, system_libraries
from hvdtrain.horovod_build.running import Log, Reporter, pip, run
from hvdtrain.horovod_build.wishes import HOROVOD, Wishes

_INSTALL_S = 900.0
_TRIAL_S = 180.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What `install` came to.

    Attributes:
        stamp: Of the Horovod that is installed now.
        done: "present" (nothing to do), "cached" (from a finished wheel) or "built".
        wheel: The finished wheel; None when Horovod was present.
        build_s: Seconds that the build took.
        verified: The launchers that two ranks were tried under.
    """

    stamp: Stamp
    done: str
    wheel: Path | None = None
    build_s: float = 0.0
    verified: tuple[str, ...] = ()


def look(wishes: Wishes, environment: Mapping[str, str] = os.environ) -> Plan:
    """The plan for this machine, without fetching anything.

    Args:
        wishes: What is asked for; its source's digest is not known yet.
        environment: The user's variables.

    Raises:
        BuildError: Something is missing.
    """
    return _decide(wishes, environment, version="" if wishes.source else HOROVOD, name=wishes.source or source.PYPI)


def ahead(plan: Plan, wishes: Wishes, environment: Mapping[str, str] = os.environ) -> str:
    """What :func:`install` would do with this plan, as the words for it."""
    if wishes.source is not None:
        return "fetch the source, then see"
    if not wishes.force and _present(plan.stamp):
        return "nothing to do: it is installed"
    wheel, _ = (None, "") if wishes.force else wheels.find(wheels.folder(wishes.wheel_dir, environment), plan.stamp)
    return f"install {wheel}" if wheel else "build and install"


def install(wishes: Wishes, reporter: Reporter, environment: Mapping[str, str] = os.environ) -> Outcome:
    """Make sure that the Horovod of the plan is installed and works.

    Args:
        wishes: What is asked for.
        reporter: Is told what happens.
        environment: The user's variables.

    Raises:
        BuildError: Something is missing or failed; says what, and where the log is.
    """
    plan = look(wishes, environment)
    if wishes.source is None and not wishes.force and _present(plan.stamp):
        return Outcome(stamp=plan.stamp, done="present")
    for what, which in plan.lines:
        reporter.tell(f"  {what:<9} {which}")
    finished = wheels.folder(wishes.wheel_dir, environment)
    make_private(finished)
    logs = wheels.cache(environment) / "logs"
    make_private(logs)
    log = Log(logs / f"install-horovod-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log")
    try:
        with tempfile.TemporaryDirectory(prefix="hvdtrain-horovod-") as folder:
            return _install(plan, wishes, finished, Path(folder), reporter=reporter, environment=environment, log=log)
    except OSError as error:
        raise BuildError(f"{error}\nThe whole log: {log.path}") from error
    finally:
        log.close()


def _install(
    plan: Plan,
    wishes: Wishes,
    finished: Path,
    work: Path,
    *,
    reporter: Reporter,
    environment: Mapping[str, str],
    log: Log,
) -> Outcome:
    tree = None
    if wishes.source is not None:  # only the files themselves tell which source it is
        tree = _fetch(plan, wishes, work, reporter=reporter, environment=environment, log=log)
        plan = _decide(wishes, environment, version=tree.version, name=tree.name)
        if not wishes.force and _present(plan.stamp):
            return Outcome(stamp=plan.stamp, done="present")
    key = plan.stamp.key
    with wheels.locked(finished, key, waiting=lambda: reporter.tell("another build of the same is at work; waiting")):
        wheel, damage = (None, "") if wishes.force else wheels.find(finished, plan.stamp)
        if damage:
            reporter.tell(f"the finished wheel is damaged and is built anew: {damage}")
        stamp, done, build_s = plan.stamp, "cached", 0.0
        if wheel is None:
            began = time.monotonic()
            if tree is None:
                tree = _fetch(plan, wishes, work, reporter=reporter, environment=environment, log=log)
            built, stamp = compile_wheel(plan, tree, work, base=environment, log=log, reporter=reporter)
            wheel, done, build_s = wheels.keep(built, finished, stamp), "built", time.monotonic() - began
            reporter.tell(f"built in {build_s:.0f} s: {wheel}")
        else:
            reporter.tell(f"the wheel is there: {wheel}")
        reporter.show(None, "installing")
        _pip_install(wheel, environment=environment, folder=work, log=log)
        verified: tuple[str, ...] = ()
        if wishes.verify:
            verified = _try(stamp, work, reporter=reporter, environment=environment, log=log)
    return Outcome(stamp=stamp, done=done, wheel=wheel, build_s=build_s, verified=verified)


def _decide(wishes: Wishes, environment: Mapping[str, str], *, version: str, name: str) -> Plan:
    layout = Layout(
        prefix=Path(sys.prefix),
        packages=Path(sysconfig.get_path("platlib")),
        system_libraries=tuple(system_libraries()),
    )
    return decide(machine(environment), wishes, version=version, source=name, layout=layout, memory=_free_memory())


def _fetch(
    plan: Plan, wishes: Wishes, work: Path, *, reporter: Reporter, environment: Mapping[str, str], log: Log
) -> source.Source:
    reporter.show(None, "fetching build tools")
    tools = work / "tools"
    building = build_environment(plan, environment, tools, None)
    fetch_tools(plan, tools, environment=dict(environment), log=log)
    reporter.show(None, f"fetching Horovod from {wishes.source or source.PYPI}")
    folder = work / "fetched"
    folder.mkdir()
    return source.fetch(wishes.source, folder, environment=building, log=log)


def _present(stamp: Stamp) -> bool:
    """Whether the Horovod of this plan is installed and nothing speaks against it."""
    found = horovod_stamp.installed()
    return (
        found is not None and found.stamp is not None and found.stamp.key == stamp.key and not horovod_stamp.why_not()
    )


def _pip_install(wheel: Path, *, environment: Mapping[str, str], folder: Path, log: Log) -> None:
    """Install the wheel whatever is there, then what it depends on and lacks: torch is not among that."""
    for options in (["--force-reinstall", "--no-deps"], []):
        command = [*pip(), "install", *options, str(wheel)]
        code, lines = run(command, log=log, environment=environment, folder=folder, limit_s=_INSTALL_S)
        if code:
            said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
            raise BuildError(f"pip could not install {wheel}: {said.strip()}\nThe whole log: {log.path}")
    importlib.invalidate_caches()
    reason = horovod_stamp.why_not()
    if reason:
        raise BuildError(f"{wheel.name} was installed, but {reason}")


def _try(
    stamp: Stamp, folder: Path, *, reporter: Reporter, environment: Mapping[str, str], log: Log
) -> tuple[str, ...]:
    """An all-reduce over two ranks under each controller; returns the commands that worked."""
    package = Path(__file__).resolve().parents[2]
    variables = {**environment, "OMP_NUM_THREADS": "1"}
    if str(package) not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), environment.get("PYTHONPATH")]))
    worked = []
    for controller in [*(["--mpi"] if stamp.mpi else []), *(["--gloo"] if stamp.gloo else [])]:
        reporter.show(None, f"trying two ranks: horovodrun {controller}")
        command = [sys.executable, "-m", "horovod.runner.launch", "-np", "2", controller, "--disable-cache"]
        command += [sys.executable, "-m", "hvdtrain.horovod_build.trial"]
        code, lines = run(command, log=log, environment=variables, folder=folder, limit_s=_TRIAL_S)
        found = [line.partition("hvdtrain trial: ")[2] for line in lines if "hvdtrain trial: " in line]
        built = _json(found[0]) if found else {}
        wanted = {"mpi": stamp.mpi is not None, "gloo": stamp.gloo, "nccl": stamp.nccl is not None}
        if code or built != wanted:
            said = "\n  ".join(lines[-8:]) if code or not built else f"it has {built}, planned was {wanted}"
            raise BuildError(
                f"Horovod is installed, but two ranks under `horovodrun -np 2 {controller}` failed (exit code {code}):\n"
                f"  {said}\nThe whole log: {log.path}"
            )
        worked.append(f"horovodrun {controller}")
    return tuple(worked)


def _json(text: str) -> dict[str, bool]:
    try:
        found: dict[str, bool] = json.loads(text)
    except ValueError:
        return {}
    return found


def _free_memory() -> int | None:
    """Bytes that programs may still take; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
