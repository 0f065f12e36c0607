"""Several sources of settings over each other, and a configuration as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from hvdtrain.errors import ConfigError
from hvdtrain.settings.layers import layer, merge, plain
from hvdtrain.settings.options import Component, option, settle

# ruff: noqa: RUF009


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    cycle_time_ms: float = option(1.0, "cycle, in ms")
    autotune: bool = option(False, "tune")

    def __post_init__(self) -> None:
        settle(self, "engine")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    steps: int = option(3, "steps")
    rate: float | None = option(None, "rate")
    mode: str = option("fast", "mode", choices=("fast", "slow"))
    few: int | None = option(None, "few", excludes=("many",))
    many: int | None = option(None, "many", excludes=("few",))
    tool: Component = option(Component("saw", {"teeth": 9}), "tool", names=("saw", "axe"))
    extra: Component | None = option(None, "extra", implied=Component("axe"), names=("axe",))
    engine: Engine = option(Engine(), "engine")

    def __post_init__(self) -> None:
        settle(self)


def build(*layers: dict[str, Any]) -> Settings:
    return Settings(**merge(Settings, [layer(Settings, values) for values in layers]))


def test_a_key_with_dashes_and_with_underscores_in_one_source_is_given_twice() -> None:
    with pytest.raises(ConfigError, match="unknown key 'stesp'"):
        layer(Settings, {"stesp": 1})
    with pytest.raises(ConfigError, match="'cycle-time-ms' is given twice"):
        layer(Engine, {"cycle_time_ms": 1, "cycle-time-ms": 2})


def test_later_layers_win_field_by_field() -> None:
    assert build({"steps": 2, "mode": "slow"}, {"steps": 5}) == Settings(steps=5, mode="slow")


def test_arguments_alone_are_added_to_the_component_below() -> None:
    assert build({"tool": {"args": {"long": 1}}}).tool == Component("saw", {"teeth": 9, "long": 1})
    assert build({"tool": {"name": "axe", "kg": 2}}, {"tool": {"args": {"kg": 3}}}).tool == Component("axe", {"kg": 3})


def test_naming_a_component_anew_drops_the_arguments_below() -> None:
    assert build({"tool": "saw"}).tool == Component("saw")
    assert build({"tool": {"name": "axe", "kg": 2}}, {"tool": "saw"}).tool == Component("saw")


def test_arguments_alone_are_given_to_the_implied_component() -> None:
    assert build({"extra": {"args": {"kg": 2}}}).extra == Component("axe", {"kg": 2})


def test_a_section_merges_key_by_key() -> None:
    merged = build({"engine": {"cycle_time_ms": 4}}, {"engine": {"autotune": True}}).engine
    assert merged == Engine(cycle_time_ms=4, autotune=True)


def test_a_field_replaces_the_one_that_it_excludes_in_a_lower_layer_only() -> None:
    assert build({"few": 1}, {"many": 2}) == Settings(many=2)
    assert build({"few": 1}, {"many": None}) == Settings(few=1)
    both = build({"few": 1, "many": 2})
    assert (both.few, both.many) == (1, 2)


def test_plain_values_make_an_equal_configuration() -> None:
    config = build(
        {"tool": {"name": "axe", "args": {"name": "Ann", "kg": 2}}, "engine": {"autotune": True}, "rate": 0.5}
    )
    assert build(plain(config)) == config
    assert plain(config)["engine"] == {"cycle_time_ms": 1.0, "autotune": True}
