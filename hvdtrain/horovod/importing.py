"""``import horovod.torch`` brings our modules under Horovod's names, whether or not a Horovod is installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from hvdtrain.errors import LaunchError
from hvdtrain.horovod_modules import MODULES, NAMES, why_not_offered

STAND_IN = str(Path(__file__).with_name("stand_in"))
VERSION = "0.28.1"
"""The Horovod whose API this is."""


def install() -> None:
    """From here on, in this process and in those that take its ``sys.path``, Horovod's names are ours.

    Raises:
        LaunchError: The real Horovod has been imported already.
    """
    present = sys.modules.get("horovod")
    if present is not None and not isinstance(present, StandIn) and _is_real(present):
        raise LaunchError(
            f"the real Horovod ({present.__file__}) was imported before hvdtrain could take its place; remove that import, or run "
            "the script by itself with backend horovod"
        )
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if STAND_IN not in sys.path:
        sys.path.insert(1, STAND_IN)
    if not isinstance(present, StandIn):
        sys.modules.pop("horovod", None)
        importlib.import_module("horovod")


class StandIn(ModuleType):
    """A module under Horovod's name whose public names are those of one of ours."""

    def __getattr__(self, name: str) -> Any:
        """What our module has, and else what to do without it."""
        if name == "__version__":
            return VERSION
        if name == "__all__":
            return sorted(NAMES[MODULES[self.__name__]]) if self.__name__ != "horovod" else ["run", "torch"]
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__ not in ("horovod", "horovod.common") or name == "run":
            ours = importlib.import_module(MODULES[self.__name__])
            if hasattr(ours, name):
                return getattr(ours, name)
        whole = f"{self.__name__}.{name}"
        why = "" if whole in MODULES else why_not_offered(whole)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}" + (f". {why}" if why else ""))

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """Travels as its name: a function that uses it may be sent to other processes."""
        return importlib.import_module, (self.__name__,)

    def __dir__(self) -> list[str]:
        ours = importlib.import_module(MODULES[self.__name__])
        return sorted({*super().__dir__(), *(name for name in dir(ours) if not name.startswith("_"))})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if fullname.split(".", maxsplit=1)[0] != "horovod":
            return None
        why = why_not_offered(fullname)
        if why:
            raise ModuleNotFoundError(why, name=fullname)
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name, f"{MODULES[spec.name]} under Horovod's name.")

    def exec_module(self, module: ModuleType) -> None:
        """Everything is looked up in our module when it is asked for."""


def _is_real(module: ModuleType) -> bool:
    return getattr(module, "__file__", None) is not None and STAND_IN not in str(module.__file__)
