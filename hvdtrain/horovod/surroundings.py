"""What surrounds a script of Horovod's when it calls ``hvd.init()``: a second Horovod, and settings of the real one's."""

from __future__ import annotations

import atexit
import logging
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
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


_REMEDY = (
    "import hvdtrain.horovod in its place everywhere (`hvdtrain migrate` shows where), or run the script as it is: "
    "`python -m hvdtrain.horovod SCRIPT`"
)


def refuse_the_real(modules: Mapping[str, Any], running: Callable[[], bool]) -> None:
    """Refuse to begin beside the real Horovod, whose ranks know nothing of this job's, and that it begins beside this job.

    Args:
        modules: ``sys.modules``.
        running: Whether there is a job.

    Raises:
        ConfigError: The real one was initialised, or the script itself has it under some name.
    """
    real = modules.get("horovod.torch")
    if not isinstance(real, ModuleType) or getattr(real, "__file__", None) is None:
        if not any(isinstance(finder, _Later) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Later(running))
        return
    if real is modules.get("hvdtrain.horovod"):  # put there under Horovod's name
        return
    where = f"the real Horovod ({real.__file__})"
    if real.is_initialized():
        raise ConfigError(f"{where} was initialised beside hvdtrain.horovod, and a job has one of them: {_REMEDY}")
    theirs = {id(real), id(modules.get("horovod", real))}
    if any(id(value) in theirs for value in vars(modules["__main__"]).values()):
        raise ConfigError(f"this script imports {where} beside hvdtrain.horovod, and a job has one of them: {_REMEDY}")
    _keep_out(real, running)


class _Later(MetaPathFinder):
    """Finds the real Horovod as it would be found, and keeps it from beginning."""

    def __init__(self, running: Callable[[], bool]) -> None:
        self._running = running

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == "horovod.torch" else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Kept(spec.loader, self._running)
        return spec


class _Kept(Loader):
    def __init__(self, loader: Loader, running: Callable[[], bool]) -> None:
        self._loader, self._running = loader, running

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _keep_out(module, self._running)


def _keep_out(real: Any, running: Callable[[], bool]) -> None:
    where, begin = f"the real Horovod ({real.__file__})", real.init
    if hasattr(begin, "__wrapped__"):  # from an earlier job
        return

    @wraps(begin)
    def init(*args: Any, **named: Any) -> Any:
        if running():
            raise ConfigError(f"{where} would begin beside hvdtrain.horovod, and a job has one of them: {_REMEDY}")
        return begin(*args, **named)

    real.init = init
    _log.warning(
        "%s is imported too, and what uses it will find it not initialised; if that is your own code, %s",
        where,
        _REMEDY,
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
