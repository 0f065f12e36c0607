"""Backends by name; only the one asked for is imported.

A third-party backend registers a subclass of `hvdtrain.backends.base.Backend` under the entry-point group
``hvdtrain.backends`` and must pass the conformance suite (`hvdtrain.testing`).
"""

from __future__ import annotations

import difflib
import importlib
import logging
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from hvdtrain.backends.recommended import asked_for, check_device, check_recommendation, read_recommendation
from hvdtrain.errors import BackendUnavailable, ConfigError
from hvdtrain.launch.detect import Detection, detect
from hvdtrain.launch.machine import this_machine

if TYPE_CHECKING:
    from hvdtrain.backends.base import Backend

_log = logging.getLogger(__name__)

_BUILT_IN = {
    "local": "hvdtrain.backends.local:LocalBackend",
    "torch": "hvdtrain.backends.ddp:TorchBackend",
    "mpi": "hvdtrain.backends.mpi:MpiBackend",
    "horovod": "hvdtrain.backends.hvd.backend:HorovodBackend",
}

# What `auto` tries, in order, for the launcher that started this process; launchers not named here: torch.
_PREFERRED: dict[str, tuple[str, ...]] = {
    "none": ("local",),
    "horovodrun": ("horovod", "torch"),
    "mpirun": ("mpi", "torch"),
    "srun": ("mpi", "torch"),
}


def names() -> list[str]:
    """Every registered backend, installed or not."""
    return sorted(_sources())


def available() -> list[str]:
    """The backends that can be used in this Python environment."""
    return [name for name in names() if not why_not(name)]


def why_not(name: str) -> str:
    """Why a registered backend cannot be used here, with the command that mends it; "" if it can."""
    try:
        return load(name).unusable()
    except BackendUnavailable as error:
        return str(error)


def load(name: str) -> type[Backend]:
    """Import a backend's class.

    Raises:
        ConfigError: No backend has that name; names the nearest.
        BackendUnavailable: Its module cannot be imported.
    """
    sources = _sources()
    if name not in sources:
        near = difflib.get_close_matches(name, ["auto", *sources], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown backend {name!r}{hint} Registered: {', '.join(sorted(sources))}, and auto.")
    module, _, attribute = sources[name].partition(":")
    try:
        found: type[Backend] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(f"backend {name!r} ({sources[name]}) cannot be imported: {error}") from error
    return found


def choose(detection: Detection, wanted: str = "auto") -> tuple[str, str]:
    """Choose a backend for ``--backend auto``, ``--backend auto:RUN``, or one that has a name.

    Returns:
        Its name, and the reason in words.

    Raises:
        ConfigError: There is no record at RUN, or it was made on another machine, launcher or number of ranks.
        BackendUnavailable: None can be used.
    """
    run = asked_for(wanted)
    if run is not None:
        found = read_recommendation(run)
        check_recommendation(found, detection.topology, this_machine())
        return found.best, f"{detection.reason}, {found.file} -> {found.best}"
    if wanted != "auto":
        return wanted, ""
    topology = detection.topology
    for name in _PREFERRED.get(topology.launcher, ("torch",)):
        if name in _sources() and not why_not(name):
            return name, f"{detection.reason} -> {name}"
    raise BackendUnavailable(f"no backend can serve {topology.launcher}; usable here: {', '.join(available())}")


def create(name: str = "auto", *, detection: Detection | None = None, **options: Any) -> Backend:
    """Make a backend for this process's place in the job; it is started by its `with` block or `start()`.

    Args:
        name: A registered name, "auto" to go by the launcher, or "auto:RUN" to go by what ``hvdtrain bench engines --out RUN``
            has found.
        detection: What the launcher's environment says; read from the environment if not given.
        options: Of the backend's class; see `Backend`, `LocalBackend`, `TorchBackend`.

    Raises:
        ConfigError: Unknown name or option; or what RUN holds is of another machine, launcher, device or number of ranks.
        BackendUnavailable: Not installed here; says how to install it.
        LaunchError: The launcher's environment is contradictory, or cannot carry this backend.
    """
    detection = detection or detect()
    run = asked_for(name)
    name, reason = choose(detection, name)
    cls = load(name)
    missing = cls.unusable()
    if missing:
        raise BackendUnavailable(f"backend {name!r}: {missing}. Usable here: {', '.join(available())}.")
    try:
        backend = cls(detection, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        option = str(error).rsplit("'", 2)[-2]
        raise ConfigError(f"backend {name!r} has no option {option!r}") from error
    if run is not None:
        check_device(read_recommendation(run), backend.device.type)
    if reason:
        _log.debug("backend: %s", reason)
    return backend


def _sources() -> dict[str, str]:
    found = {point.name: point.value for point in entry_points(group="hvdtrain.backends")}
    return {**found, **_BUILT_IN}


__all__ = ["available", "choose", "create", "load", "names", "why_not"]
