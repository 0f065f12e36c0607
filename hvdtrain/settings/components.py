"""From a named component to the callable it means: import, checked argument names, clear refusals.

Importing a component runs its module, torch among others; nothing on the way to ``--help`` comes here. Arguments are
checked by name against the signature, their values by the callable itself.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn, get_type_hints

from hvdtrain.errors import ConfigError, HvdtrainError
from hvdtrain.settings.options import Component
from hvdtrain.settings.wording import did_you_mean, nearest, shown

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_INSTALL = {"torchvision": "pip install 'hvdtrain[vision]'"}
_LISTED_NAMES = 12
_MOST_CHARACTERS = 500  # of an error's text
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A callable and the keyword arguments that the configuration gives it.

    Args:
        target: A class or a function.
        kwargs: Arguments whose names the target takes.
        path: Where the target was found, for messages.
        flag: The flag that named it, for messages.
    """

    target: Callable[..., Any]
    kwargs: Mapping[str, Any]
    path: str
    flag: str

    def __call__(self, *args: Any, **provided: Any) -> Any:
        """Calls the target with the configured arguments besides those provided here.

        Raises:
            ConfigError: The target failed, or ended the program; the message says how and where.
        """
        try:
            return self.target(*args, **{**self.kwargs, **provided})
        except HvdtrainError:
            raise
        except (Exception, SystemExit) as error:
            given = ", ".join(f"{name}={shown(value)}" for name, value in self.kwargs.items())
            raise ConfigError(
                f"{self.flag} {self.path}({given}) failed: {described(error)}{self._meant(error)}"
            ) from error

    def _meant(self, error: BaseException) -> str:
        """The nearest argument to one that was passed on by ``**kwargs`` and refused further down."""
        refused = _UNEXPECTED.search(str(error))
        if not refused:
            return ""
        names = _argument_names(self.target)
        try:
            returned = get_type_hints(self.target).get("return")
        except (NameError, TypeError, AttributeError):
            returned = None
        if isinstance(returned, type):  # torchvision's resnet18(**kwargs) -> ResNet
            names += _argument_names(returned)
        return did_you_mean(refused[1], names)


def resolve(
    component: Component,
    *,
    where: Sequence[str | Mapping[str, Callable[..., Any]]] = (),
    flag: str,
    provided: Collection[str] = (),
    remedy: str = "",
) -> Resolved:
    """Imports what ``component`` names and checks its arguments by name.

    Args:
        component: A short name or an import path, and arguments.
        where: Where short names are looked up, in this order: mappings of names to callables, and modules by their
            import paths ("torch.optim"). Upper and lower case are alike where only one name fits.
        flag: The flag that named the component, for messages: ``--model``.
        provided: Names of the arguments that the caller will give by position or by name; they cannot be
            configured a second time, and they are not missing.
        remedy: What to do about an argument that is missing, where the flag takes none; "" for giving it by a flag.

    Raises:
        ConfigError: No such module, name or argument (with the nearest valid one), an import that fails, a required
            argument that is missing, or something that cannot be called.
    """
    if component.is_path:
        target, path = _import(component.name, flag)
    else:
        target, path = _look_up(component.name, where, flag)
    if not callable(target):
        kind = "module" if isinstance(target, ModuleType) else type(target).__name__
        raise ConfigError(
            f"{flag} {shown(component.name)} is a {kind}, which cannot be called; name a class or a function"
        )
    _check_arguments(target, component, flag, provided, remedy)
    return Resolved(target=target, kwargs=dict(component.args), path=path, flag=flag)


def _import(name: str, flag: str) -> tuple[Any, str]:
    """The object at ``package.module.Name`` or ``package.module:Name``."""
    module_path, colon, attributes = name.partition(":")
    if colon:
        target: Any = _module(module_path.split("."), flag)
        names = attributes.split(".")
    else:
        parts = name.split(".")
        target, names = _longest_module(parts, flag)
    for attribute in names:
        if not hasattr(target, attribute):
            _refuse_name(flag, attribute, target)
        target = getattr(target, attribute)
    return target, name.replace(":", ".")


def _longest_module(parts: list[str], flag: str) -> tuple[ModuleType, list[str]]:
    """The longest importable start of a dotted path, and the attributes that follow it.

    Not `pkgutil.resolve_name`, which takes a module that is there and fails to import for one that is not there.
    """
    module = _module(parts[:1], flag)
    for position, name in enumerate(parts[1:], start=1):
        attribute = getattr(module, name, None)
        if isinstance(attribute, ModuleType):
            module = attribute
        elif attribute is None and hasattr(module, "__path__"):
            module = _module(parts[: position + 1], flag)
        else:
            return module, parts[position:]
    return module, []


def _module(parts: list[str], flag: str) -> ModuleType:
    path = ".".join(parts)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != path and not path.startswith(missing + "."):
            raise ConfigError(f"{flag}: importing {shown(path)} failed: {described(error)}") from error
        _refuse_module(flag, missing, error)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{flag}: importing {shown(path)} failed: {described(error)}{_torchvision_advice(path)}"
        ) from error


def _refuse_module(flag: str, missing: str, error: ImportError) -> NoReturn:
    parent, _, name = missing.rpartition(".")
    if parent:
        _refuse_name(flag, name, importlib.import_module(parent), error)
    advice = _INSTALL.get(missing)
    if advice:
        raise ConfigError(f"{flag} needs {missing}, which is not installed; {advice}") from error
    known = {module.name for module in pkgutil.iter_modules()} | set(sys.stdlib_module_names)
    guess = did_you_mean(missing, sorted(name for name in known if not name.startswith("_")))
    raise ConfigError(
        f"{flag}: there is no module {shown(missing)}{guess or '; install it, or run from the folder that holds it'}"
    ) from error


def _refuse_name(flag: str, name: str, owner: Any, error: BaseException | None = None) -> NoReturn:
    path = getattr(owner, "__name__", repr(owner))
    names = [public for public in dir(owner) if not public.startswith("_")]
    names += [module.name for module in pkgutil.iter_modules(getattr(owner, "__path__", ()))]
    raise ConfigError(f"{flag}: {path} has no {shown(name)}{did_you_mean(name, names)}") from error


def _look_up(
    name: str, where: Sequence[str | Mapping[str, Callable[..., Any]]], flag: str
) -> tuple[Callable[..., Any], str]:
    """The callable with this short name."""
    known: dict[str, tuple[Callable[..., Any], str]] = {}
    for space in where:
        if isinstance(space, Mapping):
            here = {key: (target, key) for key, target in space.items()}
        else:
            module = _module(space.split("."), flag)
            here = {key: (target, f"{space}.{key}") for key, target in vars(module).items() if _is_public(key, target)}
        for key, entry in here.items():
            known.setdefault(key, entry)
    alike = [key for key in known if key.lower() == name.lower()]
    if name in known or len(alike) == 1:
        return known[name if name in known else alike[0]]
    guess = nearest(name, known)
    listed = f"Known: {', '.join(known)}" if len(known) <= _LISTED_NAMES else f"There are {len(known)} known names"
    raise ConfigError(
        f"{flag} does not know {shown(name)}{f'; did you mean {guess!r}?' if guess else ';'} {listed}, or give an import "
        "path such as package.module:Name"
    )


def _is_public(name: str, target: Any) -> bool:
    return callable(target) and not name.startswith("_") and not inspect.isabstract(target)


def _check_arguments(
    target: Callable[..., Any], component: Component, flag: str, provided: Collection[str], remedy: str
) -> None:
    parameters = _parameters(target)
    if parameters is None:
        return
    names = _argument_names(target)
    free = [name for name in names if name not in provided]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in component.args:
        if name in provided:
            raise ConfigError(f"{flag}.{name} cannot be given: hvdtrain gives {component.name} this argument itself")
        if name not in names and not takes_any:
            takes = f"It takes {', '.join(free)}" if free else "It takes no arguments"
            guess = did_you_mean(name, free) or ";"
            raise ConfigError(f"{flag}.{name}: {component.name} has no argument {shown(name)}{guess} {takes}")
    for name in free:
        if parameters[name].default is inspect.Parameter.empty and name not in component.args:
            what_to_do = remedy or f"give {flag}.{name} VALUE"
            raise ConfigError(f"{flag} {component.name} needs the argument {shown(name)}; {what_to_do}")


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """The parameters, or None for a builtin that does not say."""
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return None


def _argument_names(target: Callable[..., Any]) -> list[str]:
    return [name for name, parameter in (_parameters(target) or {}).items() if parameter.kind in _NAMED]


def _torchvision_advice(path: str) -> str:
    if path.partition(".")[0] != "torchvision":
        return ""
    return (
        ". This torchvision belongs to another build of torch; install the two from the same index, as in "
        "pip install --force-reinstall torch torchvision"
    )


def described(error: BaseException) -> str:
    """Type, text and place of an error, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its text cannot be had)"
    text = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    place = f" (at {frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, ImportError) else ""
    return f"{type(error).__name__}{f': {text}' if text else ''}{place}"
