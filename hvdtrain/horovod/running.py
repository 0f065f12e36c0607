"""``horovod.run``: a function on several ranks of this machine, started from a script or a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvdtrain.backends.base import Backend
from hvdtrain.errors import ConfigError
from hvdtrain.horovod import state
from hvdtrain.workers import spawn

_HERE = ("localhost", "127.0.0.1")


def run(
    func: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_proc: int = 1,
    *,
    np: int | None = None,
    hosts: str | None = None,
    hostfile: str | None = None,
    **settings: Any,
) -> list[Any]:
    """Run ``func(*args, **kwargs)`` on ranks of this machine; it calls ``hvd.init()`` itself.

    Args:
        func: Any function, one of a notebook too.
        args: Its arguments.
        kwargs: Its arguments by name.
        num_proc: The number of ranks.
        np: The same, by its old name.
        hosts: None, or this machine ("localhost:4").
        hostfile: Refused: ranks on other hosts are started by a launcher.
        settings: Horovod's other arguments, which say how its launcher works; accepted and of no effect.

    Returns:
        What ``func`` returned on each rank, in rank order.

    Raises:
        RankFailure: A rank failed; the message holds its traceback.
        ConfigError: Other hosts were named.
    """
    others = [host for host in (hosts or "").split(",") if host and host.split(":")[0] not in _HERE]
    if hostfile is not None or others:
        named = f"hostfile={hostfile!r}" if hostfile is not None else f"hosts={hosts!r}"
        raise ConfigError(f"horovod.run({named}): ranks on other hosts are started by torchrun, mpirun or srun")
    ranks = num_proc if np is None else np
    return spawn(_on_rank, ranks, "torch", (func, tuple(args), dict(kwargs or {})))


def _on_rank(backend: Backend, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One rank: the function starts its own backend by ``hvd.init()``, so that of `spawn` makes room."""
    backend.stop()
    state.want_backend("torch")
    try:
        result = func(*args, **kwargs)
        state.shutdown()
    except BaseException as error:
        if state.is_initialized():
            state.job().backend.abort(error)
        raise
    return result
