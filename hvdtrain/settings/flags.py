"""Flags, ``--config`` files and ``--help`` of a command whose settings are an options dataclass.

Not argparse: `parse_known_args` leaves the arguments of a component (``--model.num-classes 10``) unread, which are
known only once it is imported, takes ``--lr -1e-3`` for a flag without a value, and names no nearest flag;
`BooleanOptionalAction` makes ``--no-horovod.autotune`` and refuses ``--download=false``. Nothing is imported here
beyond the standard library, but ruamel.yaml where there is YAML to read.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.settings.layers import layer, merge, plain
from hvdtrain.settings.options import Component, Option, every_option_of, flag_of, options_of
from hvdtrain.settings.wording import nearest, shown
from hvdtrain.settings.yaml_text import dump, load_mapping, parse_value

_HELP_COLUMN = 26
_GENERAL = (
    ("--config FILE", "YAML file with flags as keys (max_steps: 100); may be given again, later ones win; flags win"),
    ("--print-config", "print the resulting configuration as YAML, which --config takes, and end"),
    ("--version", "print the versions of hvdtrain, torch and Python, and end"),
    ("-h, --help", "print this and end"),
)
_SWITCHES = ("help", "version", "print_config")


class UsageError(ConfigError):
    """The command line is wrong by itself: every rank of a job finds the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """A command line as it was typed: files are not read and values not converted yet.

    Args:
        values: By field; components as ``{"name": ..., "args": ...}``, sections as mappings.
        files: The ``--config`` files in their order.
        switches: Which of ``help``, ``version`` and ``print_config`` were asked for.
        places: Words that belong to no flag, of a command that takes such.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    switches: frozenset[str] = frozenset()
    places: tuple[str, ...] = ()


def read_flags(cls: type, argv: Sequence[str], *, places: int = 0) -> Flags:
    """The command line of a command with the options of ``cls``, and at most so many words of no flag; opens no file.

    Raises:
        UsageError: A flag is unknown (with the nearest valid one), has no value, or a word belongs to no flag.
    """
    options = {entry.name: entry for entry in every_option_of(cls)}
    negatives = {_negative(entry.name): entry for entry in options.values() if entry.kind is bool}
    values: dict[str, Any] = {}
    files: list[str] = []
    switches: set[str] = set()
    own_words: list[str] = []
    words = iter(argv)
    boolean_before = None
    for word in words:
        if not word.startswith("-"):
            if len(own_words) == places:
                raise UsageError(_stray_word(word, None if places else boolean_before))
            own_words.append(word)
            continue
        typed, equals, text = word.partition("=")
        name = "help" if typed == "-h" else typed[2:].replace("-", "_") if typed.startswith("--") else ""
        head, _, argument = name.partition(".")
        boolean_before = None
        if name in _SWITCHES and not equals:
            switches.add(name)
        elif name == "config":
            files.append(_value(word, words))
        elif name in options and options[name].kind is bool:
            boolean_before = options[name]
            _store(values, options[name], text if equals else True)
        elif name in options:
            _store(values, options[name], _value(word, words))
        elif name in negatives and not equals:
            boolean_before = negatives[name]
            _store(values, negatives[name], False)
        elif head in options and options[head].kind is Component and argument.isidentifier():
            values[head] = values.get(head) or {}
            values[head].setdefault("args", {})[argument] = _argument(word, words)
        else:
            raise UsageError(_unknown_flag(typed, [*options.values()]))
    return Flags(values=values, files=tuple(files), switches=frozenset(switches), places=tuple(own_words))


def build(cls: type, flags: Flags) -> Any:
    """The configuration that files and flags come to; files in their order, flags over all of them.

    Raises:
        ConfigError: A file or a value is wrong; the message names the file and the flag.
        UsageError: The same, when only the command line has a part in it.
    """
    layers = []
    for path in flags.files:
        content = load_mapping(path)
        try:
            layers.append(layer(cls, content))
        except ConfigError as error:
            raise ConfigError(f"--config {path}: {error}") from error
    try:
        return cls(**merge(cls, [*layers, layer(cls, flags.values)]))
    except ConfigError as error:
        if flags.files:
            raise
        raise UsageError(str(error)) from error


def config_text(config: Any) -> str:
    """The configuration as YAML under the headings of the help; ``--config`` makes an equal one of it."""
    cls: type = type(config)
    values = plain(config)
    parts = []
    for group, entries in _grouped(options_of(cls)):
        part = f"# {group}\n"
        for entry in entries:
            if entry.is_section:
                part += f"{entry.name}:\n" + textwrap.indent(dump(values[entry.name]), "  ")
            else:
                part += dump({entry.name: values[entry.name]})
        parts.append(part)
    return "\n".join(parts)


def help_text(cls: type, *, usage: str, intro: str, epilog: str, width: int = 80) -> str:
    """The whole ``--help``: usage, introduction, the flags in their groups with defaults, and the epilog.

    Args:
        cls: The options dataclass.
        usage: What follows "usage: ".
        intro, epilog: Text, kept as it is.
        width: Columns of the terminal.
    """
    parts = [f"usage: {usage}", intro, _section("general", _GENERAL, width)]
    for group, entries in _grouped(every_option_of(cls)):
        rows = [(_shown_flag(entry), f"{entry.help} (default: {_shown_default(entry)})") for entry in entries]
        parts.append(_section(group, rows, width))
    return "\n\n".join([*parts, epilog]) + "\n"


def _grouped(options: Sequence[Option]) -> list[tuple[str, list[Option]]]:
    groups: dict[str, list[Option]] = {}
    for entry in options:
        groups.setdefault(entry.group or entry.name.partition(".")[0], []).append(entry)
    return list(groups.items())


def _value(word: str, words: Iterator[str]) -> str:
    typed, equals, text = word.partition("=")
    if equals:
        return text
    following = next(words, None)
    if following is None or following.startswith("--"):
        raise UsageError(f"{typed[:80]} needs a value")
    return following


def _argument(word: str, words: Iterator[str]) -> Any:
    typed = word.partition("=")[0]
    try:
        return parse_value(_value(word, words), typed)
    except UsageError:
        raise
    except ConfigError as error:
        raise UsageError(str(error)) from error


def _store(values: dict[str, Any], entry: Option, value: Any) -> None:
    section, _, name = entry.name.rpartition(".")
    if section:
        values.setdefault(section, {})[name] = value
    elif entry.kind is Component and not (entry.optional and value.lower() in ("none", "null")):
        values[entry.name] = {**(values.get(entry.name) or {}), "name": value}
    else:
        values[entry.name] = None if entry.kind is Component else value


def _stray_word(word: str, boolean: Option | None) -> str:
    if boolean is not None:
        return f"{boolean.flag} takes no value, got {shown(word)}; write {boolean.flag} or {flag_of(_negative(boolean.name))}"
    return f"unexpected argument {shown(word)}; every setting is a flag with two dashes (--epochs 3)"


def _unknown_flag(typed: str, options: Sequence[Option]) -> str:
    names = [entry.flag[2:] for entry in options]
    names += [flag_of(_negative(entry.name))[2:] for entry in options if entry.kind is bool]
    names += [flag_of(name)[2:] for name in ("config", *_SWITCHES)]
    wanted = typed.lstrip("-").replace("_", "-")
    head, _, argument = wanted.partition(".")
    guess = nearest(wanted, names)
    if argument and head not in names:
        near_head = nearest(head, [entry.name for entry in options if entry.kind is Component])
        guess = f"{near_head}.{argument}" if near_head else guess
    return f"unknown flag {shown(typed)}" + (f"; did you mean '--{guess}'?" if guess else "; --help lists the flags")


def _negative(name: str) -> str:
    """``no_x`` of ``x``, and ``section.no_x`` of ``section.x``."""
    section, dot, field_name = name.rpartition(".")
    return f"{section}{dot}no_{field_name}"


def _shown_flag(entry: Option) -> str:
    if entry.kind is bool:
        return re.sub(r"^--(.*\.)?", lambda start: f"{start[0]}[no-]", entry.flag)
    value = entry.metavar or "|".join(entry.choices) or "VALUE"
    return f"{entry.flag} {value}" + (f", {entry.flag}.ARG VALUE" if entry.kind is Component else "")


def _shown_default(entry: Option) -> str:
    if entry.default_text is not None:
        return entry.default_text
    if isinstance(entry.default, bool):
        return "yes" if entry.default else "no"
    if isinstance(entry.default, Component) and not entry.default.args:
        return entry.default.name
    if isinstance(entry.default, float):
        return f"{entry.default:g}"
    return "none" if entry.default is None else str(entry.default)


def _section(title: str, rows: Sequence[tuple[str, str]], width: int) -> str:
    indent = " " * _HELP_COLUMN
    lines = [f"{title}:"]
    for flag, text in rows:
        wrapped = textwrap.wrap(
            text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
        )
        if len(flag) + 4 <= _HELP_COLUMN:
            wrapped[0] = f"  {flag}".ljust(_HELP_COLUMN) + wrapped[0].lstrip()
        else:
            lines.append(f"  {flag}")
        lines += wrapped
    return "\n".join(lines)
