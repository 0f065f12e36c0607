"""YAML in and out, by the scalar rules of YAML 1.2.

PyYAML follows YAML 1.1, where ``1e-3`` is text, ``no`` is false, ``010`` is 8 and ``1:30`` is 90. Here ``1e-3`` is a
number, only ``true`` and ``false`` are booleans, and a key given twice is an error. No tag makes an object of Python's.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from hvdtrain.errors import ConfigError

_MERGE = "tag:yaml.org,2002:merge"
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own way)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0 if re.match(r"0[xo]", text) else 10)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than text."""


for _tag, _pattern, _first in (
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("merge", re.compile(r"<<"), "<"),
):
    _anchored = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _anchored, list(_first))
    if _tag == "float":
        _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _anchored, list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


def parse_value(text: str, flag: str) -> Any:
    """The value of a component's argument as typed: ``10``, ``1e-3``, ``true``, ``[1, 2]``, ``{a: 1}``, or text.

    Raises:
        ConfigError: The text is broken YAML; the message names the flag.
    """
    try:
        return _load(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "broken YAML"
        raise ConfigError(f"{flag}: cannot read {text!r}: {problem}; put text in quotes: '\"...\"'") from error


def load_mapping(path: str) -> dict[Any, Any]:
    """The mapping that a YAML file holds; an empty file is an empty mapping.

    Raises:
        ConfigError: The file cannot be read, is no YAML, or is no mapping.
    """
    try:
        with open(path, "rb") as file:
            content = _load(file)
    except OSError as error:
        raise ConfigError(f"--config: cannot read {path!r}: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"--config {path}{where}: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {path} must hold keys and values such as 'epochs: 3', got a {type(content).__name__}"
        )
    return content


def dump(values: dict[str, Any]) -> str:
    """``values`` as YAML, one key a line, which :func:`load_mapping` reads back equal."""
    return "".join(_dump_key(key, value) for key, value in values.items())


def _dump_key(key: str, value: Any) -> str:
    text: str = yaml.dump(
        {key: value}, Dumper=_Dumper, sort_keys=False, default_flow_style=True, allow_unicode=True, width=10**9
    )
    return text.rstrip()[1:-1] + "\n"  # the braces of the outer mapping


def _load(source: Any) -> Any:
    try:
        return yaml.load(source, Loader=_Loader)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
