"""Several sources of settings over each other: files, then flags; and a configuration as plain values, for files again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.settings.options import Component, Option, options_of, spelled


def layer(cls: type, values: Mapping[Any, Any], *, section: str = "") -> dict[str, Any]:
    """One source of values, converted and checked: a YAML file, or the flags. It may be incomplete.

    Args:
        cls: The options dataclass.
        values: Keys as in YAML; components may have arguments without a name, sections some of their keys.
        section: The section that ``cls`` is, with its values in ``values``.

    Raises:
        ConfigError: A key is unknown, or a value is wrong by itself.
    """
    checked = spelled(cls, values, section=section)
    for entry in options_of(cls, section):
        name = entry.name.rpartition(".")[2]
        value = checked.get(name)
        if name not in checked or (value is None and entry.optional):
            continue
        if entry.is_section and isinstance(value, Mapping):
            checked[name] = layer(entry.kind, value, section=entry.name)
        elif entry.kind is Component and entry.partial_component(value)[0] is None:
            checked[name] = {"args": entry.partial_component(value)[1]}
        else:
            checked[name] = entry.convert(value)
    return checked


def merge(cls: type, layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Keyword arguments for ``cls`` out of several sources, later ones winning.

    A component's arguments are added to those of the layers below unless this layer names the component anew, which
    starts from that component alone. A section merges key by key. A field drops those it excludes from lower layers.

    Args:
        cls: The options dataclass.
        layers: What :func:`layer` returned, lowest first.
    """
    merged: dict[str, Any] = {}
    for values in layers:
        for entry in options_of(cls):
            if entry.name not in values:
                continue
            value = values[entry.name]
            if value is not None:
                for other in entry.excludes:
                    if other not in values:
                        merged.pop(other, None)
            if entry.kind is Component and isinstance(value, Mapping):
                value = _with_arguments(entry, merged.get(entry.name, entry.default), value["args"])
            elif entry.is_section and isinstance(value, Mapping):
                lower = merged.get(entry.name)
                value = {**(lower if isinstance(lower, Mapping) else {}), **value}
            merged[entry.name] = value
    return merged


def _with_arguments(entry: Option, lower: Component | None, args: Mapping[str, Any]) -> Component:
    below = lower or entry.implied
    if below is None:
        raise ConfigError(
            f"{entry.flag}.{next(iter(args), 'ARG')} needs {entry.flag} {entry.metavar or 'NAME'} as well"
        )
    return Component(below.name, {**below.args, **args})


def plain(config: Any) -> dict[str, Any]:
    """An options dataclass as nested dicts of plain values, for YAML or JSON; :func:`layer` takes it back."""
    return {entry.name: _plain_value(getattr(config, entry.name)) for entry in dataclasses.fields(config)}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Component):
        if not value.args:
            return value.name
        if {"name", "args"} & set(value.args):
            return {"name": value.name, "args": dict(value.args)}
        return {"name": value.name, **value.args}
    return plain(value) if dataclasses.is_dataclass(value) else value
