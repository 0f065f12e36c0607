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

from hvdtrain.errors import BackendUnavailable, ConfigError
from hvdtrain.launch.detect import Detection, detect

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


def choose(detection: Detection) -> tuple[str, str]:
    """Choose a backend for ``--backend auto``.

    Returns:
        Its name, and the reason in words.
    """
    topology = detection.topology
    for name in _PREFERRED.get(topology.launcher, ("torch",)):
        if name in _sources() and not why_not(name):
            return name, f"{detection.reason} -> {name}"
    raise BackendUnavailable(f"no backend can serve {topology.launcher}; usable here: {', '.join(available())}")


def create(name: str = "auto", *, detection: Detection | None = None, **options: Any) -> Backend:
    """Make a backend for this process's place in the job; it is started by its `with` block or `start()`.

    Args:
        name: A registered name, or "auto" to go by the launcher.
        detection: What the launcher's environment says; read from the environment if not given.
        options: Of the backend's class; see `Backend`, `LocalBackend`, `TorchBackend`.

    Raises:
        ConfigError: Unknown name or option.
        BackendUnavailable: Not installed here; says how to install it.
        LaunchError: The launcher's environment is contradictory, or cannot carry this backend.
    """
    detection = detection or detect()
    reason = ""
    if name == "auto":
        name, reason = choose(detection)
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
    if reason:
        _log.debug("backend: %s", reason)
    return backend


def _sources() -> dict[str, str]:
    found = {point.name: point.value for point in entry_points(group="hvdtrain.backends")}
    return {**found, **_BUILT_IN}


__all__ = ["available", "choose", "create", "load", "names", "why_not"]
