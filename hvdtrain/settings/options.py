"""How one dataclass field becomes a flag, a YAML key and a checked value.

A dataclass whose fields are made with :func:`option` needs nothing else: :func:`options_of` lists them for the command
line and for YAML, and :func:`settle` (called by its ``__post_init__``) converts and checks what it was given. Messages
name the flag, the value and what would be right.

This module parses no argv, reads no file, and imports nothing beyond the standard library.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.settings.wording import did_you_mean, nearest, one_of, shown

_IDENTIFIER = r"[^\W\d]\w*"
_IMPORT_PATH = re.compile(rf"{_IDENTIFIER}(\.{_IDENTIFIER})*[.:]{_IDENTIFIER}(\.{_IDENTIFIER})*")
_DURATION_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
MOST_SECONDS = 2_000_000
"""Of a wait, 23 days: systems count its milliseconds in 31 bits."""
_MOST_DIGITS = 15
"""Of a whole number: more than any count here, and every sum and product of a few stays far from a machine's bounds."""
_MOST_CHARACTERS = 4096
"""Of a text: the longest path that Linux takes."""
_METADATA = "hvdtrain.option"


@dataclass(frozen=True, slots=True)
class Component:
    """Something importable and the arguments to call it with; nothing is imported until it is resolved.

    Args:
        name: A known short name ("digits", "AdamW") or an import path ("package.module.Name", "package.module:Name").
        args: Keyword arguments.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={shown(value)}' for key, value in self.args.items())})"

    @property
    def is_path(self) -> bool:
        """Whether the name is an import path and not a short name."""
        return is_import_path(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One flag, YAML key and dataclass field.

    Args:
        name: The field, for a field of a section with the section before it: ``horovod.cycle_time_ms``.
        kind: bool, int, float, str, :class:`Component`, or a dataclass (a section of its own).
        optional: Whether None is a value.
        default: The dataclass's default.
        help: What it does, with its unit.
        group: Heading in ``--help``.
        metavar: Placeholder of the value in ``--help``.
        default_text: What ``--help`` shows as the default where the value itself says too little.
        choices: The only values (strings) there are.
        at_least, above, at_most, below: Bounds of a number.
        names: Short names of a component; with ``prefixes`` those that carry a tail ("imagefolder:DIR").
        more_names: Whether other short names may exist that only an import can show ("AdamW" of torch.optim).
        excludes: Fields that cannot be given together with this one.
        implied: The component meant when this one is None.
        duration: A number of seconds that may be written "90s", "5m", "2h".
    """

    name: str
    kind: type
    optional: bool
    default: Any
    help: str = ""
    group: str = ""
    metavar: str | None = None
    default_text: str | None = None
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    names: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    more_names: bool = False
    excludes: tuple[str, ...] = ()
    implied: Component | None = None
    duration: bool = False

    @property
    def flag(self) -> str:
        """As typed: ``--max-steps``."""
        return flag_of(self.name)

    @property
    def is_section(self) -> bool:
        """Whether this field is a dataclass with options of its own."""
        return self.kind is not Component and dataclasses.is_dataclass(self.kind)

    def convert(self, value: Any) -> Any:
        """The checked value of the field's type, from text, from YAML's types or from the type itself.

        Raises:
            ConfigError: It cannot be converted or is out of bounds; the message names the flag.
        """
        if value is None or (self.optional and isinstance(value, str) and value.lower() in ("none", "null")):
            if self.optional:
                return None
            raise ConfigError(f"{self.flag} needs a value, got none")
        if self.is_section:
            return value if isinstance(value, self.kind) else self.kind(**self._section(value))
        if self.kind is Component:
            return self._component(value)
        if self.duration:
            value = self._seconds(value)
        converters: dict[type, Callable[[Any], Any]] = {
            bool: self._bool,
            int: self._int,
            float: self._float,
            str: self._str,
        }
        converted = converters[self.kind](value)
        self._check(converted)
        return converted

    def partial_component(self, value: Any) -> tuple[str | None, dict[str, Any]]:
        """The name (None when only arguments were given) and the arguments out of the forms a component is written in.

        A component is written ``NAME``, ``{name: NAME, argument: value}`` or ``{name: NAME, args: {argument: value}}``;
        the last serves arguments that are themselves called ``name`` or ``args``.
        """
        if isinstance(value, Component):
            return value.name, dict(value.args)
        if isinstance(value, str):
            return value, {}
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{self.flag} must be a name, or a mapping with the key 'name' and the arguments, got {shown(value)}"
            )
        rest = {key: content for key, content in value.items() if key != "name"}
        name = value.get("name")
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"{self.flag}: 'name' must be text, got {shown(name)}")
        if set(rest) == {"args"} and isinstance(rest["args"], Mapping):
            rest = dict(rest["args"])
        args: dict[str, Any] = {}
        for key, content in rest.items():
            argument = key.replace("-", "_") if isinstance(key, str) else key
            if not isinstance(argument, str) or not argument.isidentifier():
                raise ConfigError(f"{self.flag}: {shown(key)} cannot be the name of an argument")
            if argument in args:
                raise ConfigError(f"{self.flag}: the argument {shown(argument)} is given twice")
            args[argument] = content
        return name, args

    def _component(self, value: Any) -> Component:
        name, args = self.partial_component(value)
        if not name:
            raise ConfigError(f"{self.flag} needs a name besides its arguments {', '.join(args) or '(none)'}")
        self._check_text(name)
        self._check_component_name(name)
        return Component(name, args)

    def _check_component_name(self, name: str) -> None:
        for prefix in self.prefixes:
            if name.startswith(prefix) and len(name) > len(prefix):
                return
            if name in (prefix, prefix.rstrip(":")):
                raise ConfigError(f"{self.flag} {shown(name)} is incomplete; write {prefix}DIR")
        if name in self.names or is_import_path(name) or (self.more_names and name.isidentifier()):
            return
        known = (*self.names, *(f"{prefix}DIR" for prefix in self.prefixes))
        short = (*self.names, *(prefix.rstrip(":") for prefix in self.prefixes))
        message = f"{self.flag} does not know {shown(name)}"
        guess = nearest(name.partition(":")[0], short)
        if guess:
            message += f"; did you mean {guess!r}?"
        said = f"Known: {', '.join(known)}, or an import path" if known else "It takes an import path"
        raise ConfigError(f"{message}{'' if guess else ';'} {said} such as package.module:Name")

    def _section(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.flag[2:]} is a section of its own (a mapping), got {shown(value)}")
        return spelled(self.kind, value, section=self.name)

    def _bool(self, value: Any) -> bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, bool):
            raise ConfigError(f"{self.flag} must be true or false, got {shown(value)}")
        return value

    def _int(self, value: Any) -> int:
        number = self._float(value, wanted="a whole number")
        if abs(number) >= 10**_MOST_DIGITS:
            raise ConfigError(f"{self.flag} must have at most {_MOST_DIGITS} digits, got {shown(value)}")
        if not number.is_integer():
            raise ConfigError(f"{self.flag} must be a whole number, got {shown(value)}")
        try:
            return int(value)
        except ValueError:  # "1e4"
            return int(number)

    def _float(self, value: Any, wanted: str = "a number") -> float:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{self.flag} must be {wanted}, got {shown(value)}") from error
        if not math.isfinite(number):
            raise ConfigError(f"{self.flag} must be a finite number, got {shown(value)}")
        return number

    def _str(self, value: Any) -> str:
        text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        if hasattr(text, "__fspath__"):
            text = text.__fspath__()
        if not isinstance(text, str):
            raise ConfigError(f"{self.flag} must be text, got {shown(value)}")
        if not text.strip():
            raise ConfigError(f"{self.flag} must not be empty")
        self._check_text(text)
        return text

    def _check_text(self, text: str) -> None:
        """Refuses what no file name and no ``config.yaml`` can hold."""
        if len(text) > _MOST_CHARACTERS:
            raise ConfigError(f"{self.flag} must have at most {_MOST_CHARACTERS} characters, got {shown(text)}")
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{self.flag} must be text, without zero bytes and in UTF-8, got {shown(text)}")

    def _seconds(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"\s*([-+.\deE]+)\s*([smhd]?)\s*", value)
        try:
            return float(match[1]) * _DURATION_UNITS[match[2]] if match else float(value)
        except ValueError as error:
            raise ConfigError(
                f"{self.flag} must be seconds, or a duration like 90s, 5m or 2h, got {shown(value)}"
            ) from error

    def _check(self, value: Any) -> None:
        if self.choices and value not in self.choices:
            raise ConfigError(
                f"{self.flag} must be {one_of(self.choices)}, got {shown(value)}{did_you_mean(value, self.choices)}"
            )
        for bound, fails, words in (
            (self.at_least, self.at_least is not None and value < self.at_least, "at least"),
            (self.above, self.above is not None and value <= self.above, "more than"),
            (self.at_most, self.at_most is not None and value > self.at_most, "at most"),
            (self.below, self.below is not None and value >= self.below, "less than"),
        ):
            if fails:
                raise ConfigError(f"{self.flag} must be {words} {bound:.15g}, got {shown(value)}")


def option(default: Any, help: str, **details: Any) -> Any:
    """A dataclass field that is also a flag and a YAML key; ``details`` are :class:`Option`'s other fields."""
    metadata = {_METADATA: {"help": help, **details}}
    if isinstance(default, Component) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@functools.cache
def options_of(cls: type, section: str = "") -> tuple[Option, ...]:
    """The options of a dataclass, in the order of its fields; with ``section`` as the fields of that section."""
    hints = typing.get_type_hints(cls)
    options = []
    for entry in dataclasses.fields(cls):
        kinds = typing.get_args(hints[entry.name]) or (hints[entry.name],)
        default = entry.default
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        options.append(
            Option(
                name=f"{section}.{entry.name}" if section else entry.name,
                kind=next(kind for kind in kinds if kind is not types.NoneType),
                optional=types.NoneType in kinds,
                default=default,
                **entry.metadata[_METADATA],
            )
        )
    return tuple(options)


def every_option_of(cls: type) -> tuple[Option, ...]:
    """The options of a dataclass with each section's own in the section's place."""
    options: list[Option] = []
    for entry in options_of(cls):
        options += options_of(entry.kind, entry.name) if entry.is_section else [entry]
    return tuple(options)


def settle(config: Any, section: str = "") -> None:
    """Converts and checks every field of a (frozen) options dataclass in place; meant for its ``__post_init__``.

    Raises:
        ConfigError: Names the flag of the first field that is wrong.
    """
    cls: type = type(config)
    for entry in options_of(cls, section):
        name = entry.name.rpartition(".")[2]
        object.__setattr__(config, name, entry.convert(getattr(config, name)))


def spelled(cls: type, values: Mapping[Any, Any], *, section: str = "") -> dict[str, Any]:
    """``values`` with its keys as the fields of ``cls`` are spelled (dashes may stand for underscores).

    Raises:
        ConfigError: A key is unknown (with the nearest valid one) or given twice.
    """
    fields = [entry.name.rpartition(".")[2] for entry in options_of(cls, section)]
    by_field: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        typed = f"{section}.{key}" if section else str(key)
        if name not in fields:
            raise ConfigError(f"unknown key {shown(typed)}{did_you_mean(name, fields)}")
        if name in by_field:
            raise ConfigError(f"the key {shown(typed)} is given twice")
        by_field[name] = value
    return by_field


def flag_of(name: str) -> str:
    """``max_steps`` as it is typed: ``--max-steps``."""
    return "--" + name.replace("_", "-")


def is_import_path(name: str) -> bool:
    """Whether ``name`` reads like ``package.module.Name`` or ``package.module:Name``."""
    return _IMPORT_PATH.fullmatch(name) is not None
