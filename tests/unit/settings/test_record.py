"""config.yaml of a run: equal when read again, compared, and never put over what is not ours."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.settings.config import Component, HorovodConfig, TrainConfig
from hvdtrain.settings.flags import Flags, build
from hvdtrain.settings.record import differences, is_record, record_text, what_stays

CONFIGS: list[dict[str, Any]] = [
    {},
    {"epochs": 0, "warmup_steps": 3, "last_batch": "merge", "run_dir": "/some/where"},
    {"task": Component("mine.tasks:T", {"args": "1e-3x", "name": "no", "sizes": [1, {"a": 1e-9}]})},
    {"global_batch_size": 60, "clip_norm": 0.1, "timeout": 90, "deterministic": True, "resume": "runs/a: b/#1"},
    {"backend": "horovod", "horovod": HorovodConfig(op="adasum", cycle_time_ms=0.5)},
]


def written(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_a_record_read_again_is_an_equal_configuration(tmp_path: Path, values: dict[str, Any]) -> None:
    config = TrainConfig(**values)
    file = written(tmp_path, record_text(config))
    assert build(TrainConfig, Flags(files=(str(file),))) == config
    assert differences(file, config) == []
    assert is_record(file)


def test_each_difference_is_said_by_its_flag_and_both_values(tmp_path: Path) -> None:
    before = TrainConfig(model=Component("mlp", {"hidden": 8}), backend="horovod", run_dir="a", resume="never")
    after = TrainConfig(epochs=3, backend="horovod", horovod=HorovodConfig(op="adasum"), run_dir="b")
    assert differences(written(tmp_path, record_text(before)), after) == [
        "--model cnn ({name: mlp, hidden: 8} in config.yaml)",
        "--epochs 3 (10 in config.yaml)",
        "--horovod.op adasum (average in config.yaml)",
    ]


OLD, NEW = TrainConfig(epochs=2), TrainConfig(epochs=3)


@pytest.mark.parametrize(
    ("content", "goes_on", "expected"),
    [
        (None, False, None),
        (None, True, None),
        (record_text(NEW), False, ""),
        (record_text(NEW), True, ""),
        ("epochs: 3  # mine\n", False, ""),
        (record_text(OLD), False, None),
        (record_text(OLD), True, ""),
        ("epochs: 2  # mine\n", False, "was not written by hvdtrain, so it stays, though .* --epochs 3 .2 in"),
        ("no_such_key: 2\n", True, ""),
        ("no_such_key: 2\n", False, "was not written by hvdtrain"),
        (record_text(OLD) + "no_such_key: 2\n", False, None),
        ("[", False, "was not written by hvdtrain"),
    ],
)
def test_a_file_that_is_there_is_replaced_only_by_a_new_run_and_only_if_it_is_a_record(
    tmp_path: Path, content: str | None, goes_on: bool, expected: str | None
) -> None:
    file = tmp_path / "config.yaml" if content is None else written(tmp_path, content)
    said = what_stays(file, NEW, goes_on=goes_on)
    if not expected:
        assert said == expected
    else:
        assert re.search(expected, said or "")


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_fifo_in_its_place_is_not_waited_for(tmp_path: Path, goes_on: bool) -> None:
    file = tmp_path / "config.yaml"
    os.mkfifo(file)
    said = what_stays(file, build(TrainConfig, Flags()), goes_on=goes_on)
    assert said == "" if goes_on else said is not None and "no plain file" in said
