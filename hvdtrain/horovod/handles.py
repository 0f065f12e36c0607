"""Handles of operations under way, and waiting for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hvdtrain.horovod.controller import Controller
from hvdtrain.horovod.passing_through import by_engine
from hvdtrain.horovod.requests import Request
from hvdtrain.horovod.state import job, real


@dataclass(frozen=True, slots=True)
class _Under:
    controller: Controller
    request: Request
    finish: Callable[[Any], Any]


_numbers = itertools.count(1)
_under_way: dict[int, _Under] = {}


def begin(controller: Controller, request: Request, finish: Callable[[Any], Any], *, waited_for: bool = False) -> int:
    """Ask for an operation, and give it a handle.

    Args:
        controller: Performs it.
        request: What is asked for.
        finish: Makes what the caller gets out of what the operation gives.
        waited_for: The caller calls `synchronize` next.
    """
    controller.submit(request, waited_for=waited_for)
    handle = next(_numbers)
    _under_way[handle] = _Under(controller, request, finish)
    return handle


@by_engine(real)
def poll(handle: int) -> bool:
    """Whether `synchronize` would return at once.

    Raises:
        ValueError: No operation under way has that handle.
    """
    if handle not in _under_way:
        job()
        raise ValueError(f"no operation has the handle {handle!r}, or it has been synchronized")
    return _under_way[handle].request.over


@by_engine(real)
def synchronize(handle: int) -> Any:
    """Wait for an operation, and return its result: what the function of the same name without ``_async`` returns.

    Returns:
        None if the operation has been synchronized before.

    Raises:
        HorovodInternalError: It failed on all ranks, or some rank did not take part.
    """
    under = _under_way.pop(handle, None)
    if under is None:
        return None
    under.controller.wait(under.request)
    return under.finish(under.request.result)
