"""YAML in and out, by YAML 1.2: ``1e-3`` is a number, ``no`` is text, ``010`` is 10, a key given twice is an error.

No tag makes an object of Python's, and what is read is bounded (`hvdtrain.settings.yaml_bounds`). ruamel.yaml is imported
when something is read or written, not before.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from hvdtrain.errors import ConfigError
from hvdtrain.settings.wording import shown

if TYPE_CHECKING:
    from ruamel.yaml import YAML

MOST_BYTES = 64 * 1024
"""Of a file or a value: a configuration is some tens of lines, and reading takes a second for 20 kB of brackets."""
_NEEDS_NO_QUOTES = re.compile(r"(?!(?i:y|n|yes|no|on|off)\Z)[a-zA-Z_./][\w./+-]*(:[\w./+-]+)*")
"""Text that other readers, those of YAML 1.1 too, take for text; ruamel.yaml alone leaves ``{:1: 2}`` unquoted."""


def parse_value(text: str, flag: str) -> Any:
    """The value of a component's argument as typed: ``10``, ``1e-3``, ``true``, ``[1, 2]``, ``{a: 1}``, or text.

    Raises:
        ConfigError: The text is broken YAML; the message names the flag.
    """
    content, problem, _ = _load(text)
    if problem:
        raise ConfigError(f"{flag}: cannot read {shown(text)}: {problem}; put text in quotes: '\"...\"'")
    return content


def load_mapping(path: str) -> dict[Any, Any]:
    """The mapping that a YAML file holds; an empty file is an empty mapping.

    Raises:
        ConfigError: The file cannot be read, is no YAML, or is no mapping.
    """
    try:
        with open(path, "rb") as file:
            content, problem, place = _load(file.read(MOST_BYTES + 1))
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
        raise ConfigError(f"--config: cannot read {shown(path)}: {getattr(error, 'strerror', error)}") from error
    if problem:
        raise ConfigError(f"--config {path}{place}: {problem}")
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
    stream = io.StringIO()
    _yaml().dump({key: value}, stream)
    return stream.getvalue().rstrip()[1:-1] + "\n"  # the braces of the outer mapping


def _load(source: str | bytes) -> tuple[Any, str, str]:
    """The content, or what is wrong with it in one line, and where: ``", line 3, column 1"``."""
    from ruamel.yaml.error import MarkedYAMLError, YAMLError  # noqa: PLC0415

    from hvdtrain.settings.yaml_bounds import TOO_DEEP  # noqa: PLC0415

    if len(source) > MOST_BYTES:
        return None, f"it is larger than {MOST_BYTES // 1024} KiB, which no configuration is", ""
    try:
        return _yaml().load(source), "", ""
    except RecursionError:  # the caller's own stack is deep
        return None, TOO_DEEP, ""
    except MarkedYAMLError as error:
        mark = error.problem_mark if error.problem != TOO_DEEP else None  # where it began matters, which nobody knows
        problem = " ".join((error.problem or "broken YAML").split())  # it may hold the text of a value
        return None, problem, f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    except YAMLError as error:
        return None, str(error).partition("\n")[0], ""


def _yaml() -> YAML:
    from ruamel.yaml import YAML  # noqa: PLC0415  (35 ms that only a command with YAML in it should cost)
    from ruamel.yaml.nodes import ScalarNode  # noqa: PLC0415
    from ruamel.yaml.representer import SafeRepresenter  # noqa: PLC0415

    from hvdtrain.settings.yaml_bounds import BoundedComposer, BoundedConstructor, BoundedScanner  # noqa: PLC0415

    class Representer(SafeRepresenter):
        """Puts text in quotes unless it is sure to need none."""

        def represent_str(self, data: str) -> ScalarNode:
            style = None if _NEEDS_NO_QUOTES.fullmatch(data) else '"'
            return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    Representer.add_representer(str, Representer.represent_str)
    yaml = YAML(typ="safe", pure=True)
    yaml.Scanner, yaml.Composer, yaml.Constructor = BoundedScanner, BoundedComposer, BoundedConstructor
    yaml.Representer = Representer
    yaml.default_flow_style = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # typed by its default, None
    yaml.width = 10**9
    return yaml
