"""Where the engine is Horovod, its own functions do the work: these names pass calls on to the same names there."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

from hvdtrain.errors import HorovodInternalError
from hvdtrain.horovod.process_sets import ProcessSet

F = TypeVar("F", bound=Callable[..., Any])


def real_horovod() -> Any:
    """The real horovod.torch, which the horovod backend has started."""
    return importlib.import_module("hvdtrain.backends.hvd.library").hvd


def by_engine(real: Callable[[], Any]) -> Callable[[F], F]:
    """A decorator: the function of the same name of the real Horovod takes the call, where that is the engine.

    Args:
        real: Returns the real Horovod, or None where another engine works.
    """

    def decorated(function: F) -> F:
        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            there = real()
            if there is None:
                return function(*arguments, **named)
            try:
                return getattr(there, function.__name__)(
                    *map(_translated, arguments), **{name: _translated(value) for name, value in named.items()}
                )
            except there.HorovodInternalError as error:
                raise HorovodInternalError(str(error)) from error

        return cast(F, called)

    return decorated


def _translated(argument: Any) -> Any:
    return argument.real if isinstance(argument, ProcessSet) and argument.real is not None else argument
