"""What YAML may hold here: the core schema's values, some levels of nesting, and no more than can be looked at.

Without bounds a line of brackets takes seconds, five lines of aliases mean a billion values, and a number of 5,000 digits
cannot be printed in the message that refuses it. Imports ruamel.yaml: only `hvdtrain.settings.yaml_text` comes here.
"""

from __future__ import annotations

from typing import Any

from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.scanner import Scanner, ScannerError

TOO_DEEP = "nested too deeply"
_MOST_LEVELS = 50
_MOST_VALUES = 50_000  # aliases counted as what they stand for
_MOST_BITS = 512
_TAG = "tag:yaml.org,2002:"
_KNOWN = ("null", "bool", "int", "float", "str", "seq", "map")
_TEXT_AFTER_ALL = ("timestamp", "value", "merge")
"""What YAML 1.2's core schema does not know as types of a value (``2026-01-31``, ``=``, ``<<``)."""


class BoundedScanner(Scanner):
    """Ends at brackets that are nested too deeply: looking for a key at each would take time by their square."""

    def fetch_flow_collection_start(self, *words: Any, **more: Any) -> None:
        """Begin a list or mapping in brackets."""
        if len(self.flow_context) >= _MOST_LEVELS:
            raise ScannerError(None, None, TOO_DEEP, self.reader.get_mark())
        super().fetch_flow_collection_start(*words, **more)


class BoundedComposer(Composer):
    """Counts values, those that an alias repeats too, and refuses one inside itself."""

    _levels = 0
    _values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One value, with all in it."""
        event = self.parser.peek_event()
        sizes: dict[str, int] = self.__dict__.setdefault("_sizes", {})
        if isinstance(event, AliasEvent):
            if event.anchor in self.anchors and event.anchor not in sizes:
                raise ComposerError(None, None, f"*{event.anchor} stands inside itself", event.start_mark)
            self._count(sizes.get(event.anchor, 0), event)
            return super().compose_node(parent, index)
        if self._levels >= _MOST_LEVELS:
            raise ComposerError(None, None, TOO_DEEP, event.start_mark)
        before = self._values
        self._count(1, event)
        sizes.pop(event.anchor, None)
        self._levels += 1
        node = super().compose_node(parent, index)
        self._levels -= 1
        if event.anchor is not None:
            sizes[event.anchor] = self._values - before
        return node

    def _count(self, more: int, event: Any) -> None:
        self._values += more
        if self._values > _MOST_VALUES:
            raise ComposerError(None, None, f"more than {_MOST_VALUES:,} values", event.start_mark)


class BoundedConstructor(SafeConstructor):
    """Makes text of what looks like a time, and knows no tags but those of values."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node; ``!!int x`` and its like are refused as broken YAML is."""
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
            if isinstance(error, ConstructorError):
                raise
            what = f"no {node.tag.removeprefix(_TAG)} can be made of this"
            if len(str(node.value)) > _MOST_BITS:
                what = "a number of too many digits"
            raise ConstructorError(None, None, what, node.start_mark) from error
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise ConstructorError(None, None, "a number of too many digits", node.start_mark)
        if isinstance(value, str) and not _can_be_written(value):
            raise ConstructorError(
                None, None, f"{value[:80]!r} is half a character, which no file can hold", node.start_mark
            )
        return value


def _can_be_written(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


for _name in _TEXT_AFTER_ALL:
    BoundedConstructor.add_constructor(_TAG + _name, SafeConstructor.construct_yaml_str)
for _tag in [*BoundedConstructor.yaml_constructors]:
    if _tag is not None and _tag.removeprefix(_TAG) not in (*_KNOWN, *_TEXT_AFTER_ALL):
        del BoundedConstructor.yaml_constructors[_tag]
