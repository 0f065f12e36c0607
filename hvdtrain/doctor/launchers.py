"""Two real ranks under each launcher that is here: what is chosen, and whether they come together and add up right."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator

from hvdtrain.backends.hvd import stamp
from hvdtrain.doctor.asking import ask
from hvdtrain.doctor.rows import Row, Section
from hvdtrain.errors import LaunchError
from hvdtrain.launch.detect import detect
from hvdtrain.launch.starting import Starter, starters, surroundings

_SECTION = Section("launchers")
_RANK = ("-m", "hvdtrain.doctor.rank")
_LIMIT_S = 120.0


def here() -> Iterator[Row]:
    """What this process's own environment says: nothing, unless variables of a launcher are left over."""
    try:
        yield _SECTION.ok("started by", detect().reason)
    except LaunchError as error:
        remedy = "unset the variables of a launcher that are left over, or start all ranks by that launcher"
        yield _SECTION.wrong("started by", error, remedy)


def trials() -> Iterator[Row]:
    """Every launcher with the engine that it is for."""
    for starter in here_with_horovod():
        yield _tried(starter)
    if shutil.which("srun") is not None:
        inside = "SLURM_JOB_ID" in os.environ
        said = (
            f"inside an allocation: srun -n2 python {shlex.join(_RANK)} tries it"
            if inside
            else "outside of an allocation"
        )
        yield _SECTION.note("srun", said)


def here_with_horovod() -> list[Starter]:
    """The launchers that are here, those of an installed Horovod among them."""
    found = stamp.installed()
    built = found.stamp if found else None
    gloo, mpi = (built.gloo, built.mpi is not None) if built else (found is not None, found is not None)
    return starters(gloo=gloo, mpi=mpi)


def _tried(starter: Starter) -> Row:
    began = time.monotonic()
    ranks = 1 if starter.backend == "local" else 2
    command = starter.command(ranks, _RANK)
    answer = ask(command, limit_s=_LIMIT_S, environment=surroundings(os.environ))
    seconds = time.monotonic() - began
    facts = answer.facts
    if answer.code == 0 and len(facts) == ranks and all(each["right"] and each["size"] == ranks for each in facts):
        together = "1 rank" if ranks == 1 else f"{ranks} ranks agree"
        first = facts[0]
        return _SECTION.ok(starter.name, f"backend {first['backend']} ({first['engine']}), {together}, {seconds:.1f} s")
    remedy = f"look at all that it says: {shlex.join(command)}"
    if answer.code == 0 and facts:
        sizes = ", ".join(f"rank {each['rank']} of {each['size']}" for each in facts)
        return _SECTION.wrong(starter.name, f"the ranks did not come together: {sizes}", remedy)
    return _SECTION.wrong(starter.name, answer.how, remedy)
