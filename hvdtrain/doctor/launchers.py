"""Two real ranks under each launcher that is here: what is chosen, and whether they come together and add up right."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec

from hvdtrain.backends.hvd import stamp
from hvdtrain.doctor.asking import ask, beside
from hvdtrain.doctor.rows import Row, Section
from hvdtrain.errors import LaunchError
from hvdtrain.launch.detect import detect
from hvdtrain.launch.leftovers import without_launchers

_SECTION = Section("launchers")
_RANK = ("-m", "hvdtrain.doctor.rank")
_LIMIT_S = 120.0
_OWN = {  # more ranks than cores, and root in a container: right for a trial of two ranks
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def here() -> Iterator[Row]:
    """What this process's own environment says: nothing, unless variables of a launcher are left over."""
    try:
        yield _SECTION.ok("started by", detect().reason)
    except LaunchError as error:
        remedy = "unset the variables of a launcher that are left over, or start all ranks by that launcher"
        yield _SECTION.wrong("started by", error, remedy)


def trials() -> Iterator[Row]:
    """Every launcher with every engine that it is for."""
    yield _tried("python", [sys.executable, *_RANK], ranks=1)
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        "--nproc-per-node",
        "2",
    ]
    yield _tried("torchrun", [sys.executable, *torchrun, *_RANK])
    mpirun = shutil.which("mpirun")
    if mpirun is not None:
        yield _tried("mpirun", [mpirun, "-np", "2", "--bind-to", "none", sys.executable, *_RANK])
    found = stamp.installed()
    horovodrun = beside("horovodrun") or shutil.which("horovodrun")
    if found is not None and horovodrun is not None and find_spec("horovod") is not None:
        built = found.stamp
        for carrier, has in (("--gloo", built is None or built.gloo), ("--mpi", built is None or bool(built.mpi))):
            if has:
                yield _tried(f"horovodrun {carrier}", [str(horovodrun), carrier, "-np", "2", sys.executable, *_RANK])
    if shutil.which("srun") is not None:
        inside = "SLURM_JOB_ID" in os.environ
        found_srun = (
            "inside an allocation: srun -n2 python -m hvdtrain.doctor.rank tries it"
            if inside
            else "outside of an allocation"
        )
        yield _SECTION.note("srun", found_srun)


def _tried(launcher: str, command: list[str], ranks: int = 2) -> Row:
    began = time.monotonic()
    environment = {**_OWN, **without_launchers(os.environ)}
    own = os.path.dirname(sys.executable)
    environment["PATH"] = f"{environment.get('PATH', '')}{os.pathsep}{own}"  # horovodrun looks for python and mpirun
    answer = ask(command, limit_s=_LIMIT_S, environment=environment)
    seconds = time.monotonic() - began
    facts = answer.facts
    if answer.code == 0 and len(facts) == ranks and all(each["right"] and each["size"] == ranks for each in facts):
        first = facts[0]
        return _SECTION.ok(
            launcher, f"backend {first['backend']} ({first['engine']}), {ranks} ranks agree, {seconds:.1f} s"
        )
    if answer.code == 0 and facts:
        sizes = ", ".join(f"rank {each['rank']} of {each['size']}" for each in facts)
        return _SECTION.wrong(
            launcher, f"the ranks did not come together: {sizes}", f"look at what they say: {' '.join(command)}"
        )
    return _SECTION.wrong(launcher, answer.how, f"look at all that it says: {' '.join(command)}")
