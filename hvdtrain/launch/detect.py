"""From the environment to the topology, and why. The only place that reads launchers' variables.

Where the variables of several launchers are there (mpirun inside an sbatch allocation, torchrun inside srun, a script
under torchrun that calls mpirun), the innermost launcher counts: the one that started this process. A launcher gives its
variables to its children only, so it is the one whose variables are missing, or different, in the nearest ancestor.
Where the process tree does not tell (no readable ``/proc``), the order of `hvdtrain.launch.launchers.LAUNCHERS` decides.

Nothing here imports an engine, opens a connection or waits.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.errors import LaunchError
from hvdtrain.launch.ancestry import Ancestor, read_ancestors
from hvdtrain.launch.launchers import LAUNCHERS, Environment, Found, Launcher, address, horovodrun_server, shown_value
from hvdtrain.launch.leftovers import leftovers, speaks_of_several
from hvdtrain.topology import Topology

_OWN_MASTER = ("torchrun", "environment")  # launchers to which MASTER_ADDR and MASTER_PORT belong


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """What the environment says about this process.

    Attributes:
        topology: Its place among the ranks.
        reason: The variable that told, for people: "mpirun: OMPI_COMM_WORLD_RANK=1 (started inside srun)".
        job_id: Equal on all ranks of one job, different for two jobs at the same time and for two attempts of one job;
            a file name of at most 100 characters.
        address: "host:port" where MASTER_ADDR and MASTER_PORT name a meeting point of exactly these ranks.
        first_host: Rank 0's host, where the environment tells.
        horovodrun_server: "host:port" of the key-value server that ``horovodrun --gloo`` runs for its ranks, where there
            is one.
        error_file: Where the launcher looks for the traceback of a rank that failed, if it does.
    """

    topology: Topology
    reason: str
    job_id: str
    address: str | None = None
    first_host: str | None = None
    horovodrun_server: str | None = None
    error_file: str | None = None


def detect(environ: Mapping[str, str] | None = None, *, ancestors: Sequence[Ancestor] | None = None) -> Detection:
    """Find out how this process was started.

    Args:
        environ: Read instead of this process's environment; the process tree is then not looked at.
        ancestors: Parent, grandparent, ..., to be read instead of the process tree.

    Returns:
        The topology with its reason; a world of one when no launcher started several processes.

    Raises:
        LaunchError: Variables are missing or contradict each other; says what was found and what is missing.
    """
    env = {name: value for name, value in (os.environ if environ is None else environ).items() if value}
    marked = [launcher for launcher in LAUNCHERS if any(name in env for name in launcher.marks)]
    if ancestors is None:
        ancestors = read_ancestors() if environ is None and (marked or speaks_of_several(env)) else ()
    present = [launcher for launcher in marked if launcher.started(env, ancestors)]
    complete = [launcher for launcher in present if all(name in env for name in launcher.needs)]
    if not complete:
        if present:
            _refuse_half_set(present[0], env)
        _refuse_leftovers(env, ancestors, ())
        return _alone(env)
    ordered = _innermost_first(complete, env, ancestors)
    launcher, outer = ordered[0], ordered[1:]
    try:
        found = launcher.read(env, ancestors)
        meeting = _meeting(launcher, outer, env)
    except LaunchError as error:
        what = str(error).removeprefix(f"{launcher.name.split()[0]}: ")
        raise LaunchError(f"{launcher.name}: {what}. {_found(launcher, env)}{_remedy(launcher, env)}") from None
    if found.topology.world_size == 1 and launcher.name != "spawn":
        nearer = _set_around(launcher, env, ancestors)
        around = {name: value for name, value in env.items() if nearer.get(name) != value}
        _refuse_leftovers(around, ancestors, [each.name for each in complete])
    inside = f" (started inside {', '.join(each.name for each in outer)})" if outer else ""
    return Detection(
        topology=found.topology,
        reason=found.reason + inside,
        job_id=_file_name(found.job),
        address=meeting,
        first_host=found.first_host,
        horovodrun_server=horovodrun_server(env),
        error_file=env.get("TORCHELASTIC_ERROR_FILE"),
    )


def _alone(env: Environment) -> Detection:
    reason = "no launcher's variables found"
    if "SLURM_JOB_ID" in env:
        reason = f"in Slurm job {shown_value(env['SLURM_JOB_ID'])}, not started by srun as one of several tasks"
    return Detection(
        topology=Topology.single(),
        reason=reason,
        job_id=f"single-{os.getpid()}",
        horovodrun_server=horovodrun_server(env),
        error_file=env.get("TORCHELASTIC_ERROR_FILE"),
    )


def _refuse_half_set(launcher: Launcher, env: Environment) -> None:
    if launcher.name == "environment" and env.get("WORLD_SIZE") == "1":
        return
    missing = [name for name in launcher.needs if name not in env]
    raise LaunchError(
        f"{launcher.name}: half of its variables are missing. {_found(launcher, env)}Missing: {', '.join(missing)}. "
        f"{_remedy(launcher, env)}"
    )


def _refuse_leftovers(env: Environment, ancestors: Sequence[Ancestor], complete: Sequence[str]) -> None:
    """Refuses a world of one where variables say that there are more processes."""
    found = leftovers(env, ancestors, complete)
    if found:
        raise LaunchError(
            f"this process would train alone, but {', '.join(f'{name}={shown_value(env[name])}' for name in found)} "
            f"{'says' if len(found) == 1 else 'say'} that it is one of several, and no launcher's variables are there "
            "whole. Something between launcher and process passes on a part of them (a container, sudo, ssh): let it "
            f"pass on all. Found: {', '.join(found)}; unset {'it' if len(found) == 1 else 'them'} to run one process"
        )


def _set_around(launcher: Launcher, env: Environment, ancestors: Sequence[Ancestor]) -> Environment:
    """What was set already where this launcher was called; empty where the process tree does not show it."""
    generation = _generation(launcher, env, ancestors)[0]
    return (ancestors[generation].environ or {}) if generation < len(ancestors) else {}


def _found(launcher: Launcher, env: Environment) -> str:
    names = (*launcher.needs, "MASTER_ADDR", "MASTER_PORT") if launcher.name in _OWN_MASTER else launcher.needs
    return f"Found: {', '.join(f'{name}={shown_value(env[name])}' for name in dict.fromkeys(names) if name in env)}. "


def _remedy(launcher: Launcher, env: Environment) -> str:
    start = "Set all of them" if launcher.name == "environment" else f"Start through {launcher.name.split()[0]}"
    return f"{start}, or unset {', '.join(name for name in launcher.marks if name in env)} to run one process"


def _innermost_first(complete: list[Launcher], env: Environment, ancestors: Sequence[Ancestor]) -> list[Launcher]:
    """The launcher that started this process first, then the one that started that one, ...

    RANK and WORLD_SIZE that say the same as a nearer or equally near launcher are no launcher of their own: scripts set
    them from Slurm's or MPI's variables.
    """
    depth = {launcher.name: _generation(launcher, env, ancestors) for launcher in complete}
    ordered = sorted(complete, key=lambda launcher: depth[launcher.name])  # stable: else the table's order
    plain = next((launcher for launcher in ordered if launcher.name == "environment"), None)
    for other in ordered:
        if plain is None or other is plain:
            continue
        same = env[other.rank] == env[plain.rank] and env[other.size] == env[plain.size]
        if same and depth[plain.name][0] <= depth[other.name][0]:
            return [launcher for launcher in ordered if launcher is not plain]
    return ordered


def _generation(launcher: Launcher, env: Environment, ancestors: Sequence[Ancestor]) -> tuple[int, bool]:
    """How far up the process tree this launcher's variables reach unchanged; the innermost reach least far."""
    for generation, ancestor in enumerate(ancestors):
        if ancestor.slurm_step is not None:
            # srun carried everything else from where it was called, so that of equals srun is the nearer.
            return generation, launcher.name != "srun"
        if ancestor.environ is not None and any(ancestor.environ.get(n) != env[n] for n in launcher.needs):
            return generation, True
    return len(ancestors), True


def _meeting(launcher: Launcher, outer: Sequence[Launcher], env: Environment) -> str | None:
    """The address that MASTER_ADDR and MASTER_PORT name, unless they are another job's, in which this one runs."""
    if launcher.name in _OWN_MASTER:
        return address(env)
    if launcher.name == "spawn" or any(each.name in _OWN_MASTER for each in outer):
        return None
    return address(env)


def _file_name(job: str) -> str:
    """The job's name as a file name; what had to be changed is kept apart by a checksum."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", job)
    if safe == job and len(job) <= 100 and not job.startswith("."):
        return job
    checksum = hashlib.sha256(job.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{safe.lstrip('.')[:80]}-{checksum}"


__all__ = ["Ancestor", "Detection", "Found", "detect"]
