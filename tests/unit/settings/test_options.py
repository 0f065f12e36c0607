"""Fields as options: conversion, bounds, sections."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.errors import ConfigError
from hvdtrain.settings.layers import layer, merge
from hvdtrain.settings.options import Component, is_import_path, option, options_of, settle

# ruff: noqa: RUF009


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    cycle_time_ms: float = option(1.0, "cycle, in ms", at_least=0)
    autotune: bool = option(False, "tune")

    def __post_init__(self) -> None:
        settle(self, "engine")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    steps: int = option(3, "steps", at_least=1, at_most=10)
    rate: float | None = option(None, "rate", above=0, below=1)
    mode: str = option("fast", "mode", choices=("fast", "slow"))
    wait: float = option(60.0, "wait, in seconds", duration=True, above=0)
    folder: str = option("here", "folder")
    strict: bool = option(True, "strict")
    few: int | None = option(None, "few", excludes=("many",))
    many: int | None = option(None, "many", excludes=("few",))
    tool: Component = option(Component("saw", {"teeth": 9}), "tool", names=("saw", "axe"), prefixes=("file:",))
    extra: Component | None = option(None, "extra", implied=Component("axe"), names=("axe",))
    plugin: Component | None = option(None, "plugin")
    engine: Engine = option(Engine(), "engine")

    def __post_init__(self) -> None:
        settle(self)


def build(*layers: dict[str, Any]) -> Settings:
    return Settings(**merge(Settings, [layer(Settings, values) for values in layers]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"steps": "7"}, 7),
        ({"steps": "1e1"}, 10),
        ({"steps": 4.0}, 4),
        ({"rate": "1e-3"}, 1e-3),
        ({"rate": "none"}, None),
        ({"wait": "90s"}, 90.0),
        ({"wait": "5m"}, 300.0),
        ({"wait": "1.5h"}, 5400.0),
        ({"wait": 30}, 30.0),
        ({"wait": "2"}, 2.0),
        ({"strict": "false"}, False),
        ({"folder": Path("/a/b")}, "/a/b"),
        ({"folder": 2026}, "2026"),
        ({"tool": "axe"}, Component("axe")),
        ({"tool": {"name": "axe", "weight-kg": 2}}, Component("axe", {"weight_kg": 2})),
        ({"tool": {"name": "axe", "args": {"name": "Ann"}}}, Component("axe", {"name": "Ann"})),
        ({"tool": "my_shop.tools:Drill"}, Component("my_shop.tools:Drill")),
        ({"tool": "file:/some/dir"}, Component("file:/some/dir")),
        ({"engine": {"cycle-time-ms": "2"}}, Engine(cycle_time_ms=2.0)),
    ],
)
def test_a_value_is_converted_to_its_fields_type(values: dict[str, Any], expected: Any) -> None:
    found = getattr(build(values), next(iter(values)))
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"steps": 11}, "--steps must be at most 10, got 11"),
        ({"steps": "many"}, "--steps must be a whole number, got 'many'"),
        ({"steps": 2.5}, "--steps must be a whole number, got 2.5"),
        ({"steps": True}, "--steps must be a whole number, got True"),
        ({"steps": None}, "--steps needs a value, got none"),
        ({"steps": [1]}, r"--steps must be a whole number, got \[1\]"),
        ({"rate": 0}, "--rate must be more than 0, got 0.0"),
        ({"rate": 1}, "--rate must be less than 1, got 1.0"),
        ({"rate": "nan"}, "--rate must be a finite number, got 'nan'"),
        ({"wait": float("inf")}, "--wait must be a finite number, got inf"),
        ({"wait": "5 weeks"}, "--wait must be seconds, or a duration like 90s, 5m or 2h, got '5 weeks'"),
        ({"wait": "-5m"}, "--wait must be more than 0, got -300.0"),
        ({"mode": "fats"}, "--mode must be one of fast, slow, got 'fats'; did you mean 'fast'?"),
        ({"strict": "on"}, "--strict must be true or false, got 'on'"),
        ({"folder": ""}, "--folder must not be empty"),
        ({"folder": ["a"]}, "--folder must be text"),
        ({"tool": "saww"}, "--tool does not know 'saww'; did you mean 'saw'.*file:DIR.*package.module:Name"),
        ({"tool": "file:"}, "--tool 'file:' is incomplete; write file:DIR"),
        ({"tool": "fil:a/b"}, "did you mean 'file'"),
        ({"tool": 3}, "--tool must be a name, or a mapping"),
        ({"tool": {"name": "axe", "two words": 1}}, "--tool: 'two words' cannot be the name of an argument"),
        ({"tool": {"name": "axe", "a-b": 1, "a_b": 2}}, "--tool: the argument 'a_b' is given twice"),
        ({"engine": 3}, "engine is a section of its own"),
        ({"engine": {"cycle_time": 1}}, "unknown key 'engine.cycle_time'; did you mean 'cycle_time_ms'?"),
        ({"engine": {"cycle_time_ms": -1}}, "--engine.cycle-time-ms must be at least 0, got -1.0"),
        ({"stesp": 1}, "unknown key 'stesp'; did you mean 'steps'?"),
        ({"few": 1, "f-ew": 2}, "unknown key 'f-ew'"),
        ({"plugin": {"args": {"a": 1}}}, "--plugin.a needs --plugin NAME as well"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_flag(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(values)


def test_a_wrong_value_is_refused_when_the_dataclass_is_made_directly() -> None:
    with pytest.raises(ConfigError, match="--steps must be at least 1, got 0"):
        Settings(steps=0)
    with pytest.raises(ConfigError, match=r"--engine\.cycle-time-ms must be at least 0"):
        Engine(cycle_time_ms=-1)


def test_options_carry_the_flag_of_their_section() -> None:
    assert [entry.flag for entry in options_of(Engine, "engine")] == ["--engine.cycle-time-ms", "--engine.autotune"]
    assert [entry.is_section for entry in options_of(Settings)][-2:] == [False, True]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.b", True), ("a.b:C", True), ("a:C.D", True), ("a", False), ("a.", False), ("a/b.c", False), ("a..b", False)],
)
def test_an_import_path_is_told_from_a_short_name(name: str, expected: bool) -> None:
    assert is_import_path(name) is expected
