"""``@hvd.elastic.run``: a training function that is begun again when the job was interrupted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from hvdtrain.errors import HorovodInternalError
from hvdtrain.horovod.elastic.interrupts import HostsUpdatedInterrupt
from hvdtrain.horovod.elastic.state import State


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator for a training function whose first argument is a `State`.

    The state is taken from rank 0 before ``func`` begins. A `HostsUpdatedInterrupt` lets it begin again, after the state's
    reset callbacks. A `HorovodInternalError` takes the state back to its last commit, and ends the job.

    Returns:
        A function that returns what ``func`` returns.
    """

    @functools.wraps(func)
    def wrapper(state: State, *args: Any, **kwargs: Any) -> Any:
        skip_sync = False
        while True:
            try:
                if not skip_sync:
                    state.sync()
                return func(state, *args, **kwargs)
            except HorovodInternalError as error:
                state.restore()
                _form_anew(error)
            except HostsUpdatedInterrupt as interrupt:
                skip_sync = interrupt.skip_sync
            state.on_reset()

    return wrapper


def _form_anew(error: HorovodInternalError) -> NoReturn:
    """The place at which the ranks that are left would form a smaller job, and `run` go on."""
    raise HorovodInternalError(
        f"{error}. The state is back at its last commit in memory, but forming the job anew without the ranks that are lost is not "
        "offered yet: start it again from a checkpoint"
    ) from error
