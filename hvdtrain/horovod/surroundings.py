"""What surrounds a script of Horovod's when it calls ``hvd.init()``: a second Horovod, and settings of the real one's."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.horovod import timeline
from hvdtrain.launch.environment import given

_log = logging.getLogger(__name__)

_OF_NO_EFFECT = (
    "FUSION_THRESHOLD", "CYCLE_TIME", "CACHE_CAPACITY", "AUTOTUNE", "AUTOTUNE_LOG", "HIERARCHICAL_ALLREDUCE",
    "HIERARCHICAL_ALLGATHER", "NUM_NCCL_STREAMS", "THREAD_AFFINITY", "BATCH_D2D_MEMCOPIES",
    "STALL_CHECK_DISABLE", "STALL_CHECK_TIME_SECONDS", "STALL_SHUTDOWN_TIME_SECONDS",
)  # fmt: skip


def refuse_the_real(modules: Mapping[str, Any]) -> None:
    """Refuse to begin beside the real Horovod, whose ranks know nothing of this job's.

    Args:
        modules: ``sys.modules``.

    Raises:
        ConfigError: The real one was initialised, or the script itself has it under some name.
    """
    real = modules.get("horovod.torch")
    if not isinstance(real, ModuleType) or getattr(real, "__file__", None) is None:
        return
    if real is modules.get("hvdtrain.horovod"):  # put there under Horovod's name
        return
    where = f"the real Horovod ({real.__file__})"
    remedy = (
        "import hvdtrain.horovod in its place everywhere (`hvdtrain migrate` shows where), or run the script as it is: "
        "`python -m hvdtrain.horovod SCRIPT`"
    )
    if real.is_initialized():
        raise ConfigError(f"{where} was initialised beside hvdtrain.horovod, and a job has one of them: {remedy}")
    theirs = {id(real), id(modules.get("horovod", real))}
    if any(id(value) in theirs for value in vars(modules["__main__"]).values()):
        raise ConfigError(f"this script imports {where} beside hvdtrain.horovod, and a job has one of them: {remedy}")
    _log.warning(
        "%s is imported too, and what uses it will find it not initialised; if that is your own code, %s", where, remedy
    )


def heed_variables() -> None:
    """On rank 0: begin the timeline that HOROVOD_TIMELINE asks for, and say which of Horovod's settings mean nothing here.

    Raises:
        OutputError: The timeline cannot be written.
    """
    idle = [f"HOROVOD_{name}" for name in _OF_NO_EFFECT if given(f"HOROVOD_{name}") is not None]
    if idle:
        _log.warning("%s: no effect on this engine; HVDTRAIN_TIMEOUT_S bounds waits for other ranks", ", ".join(idle))
    path = given("HOROVOD_TIMELINE")
    if path and path != "DYNAMIC":  # which only allows hvd.start_timeline
        timeline.begin(path, mark_cycles=given("HOROVOD_TIMELINE_MARK_CYCLES") not in (None, "", "0"))
        atexit.register(timeline.end)
