"""One line of descent a folder: what is of another line is set aside whole, and never deleted."""

from __future__ import annotations

import json
import os

import pytest
from torch import nn

from hvdtrain.training import descent
from hvdtrain.training.checkpoint import Checkpoints
from hvdtrain.training.checkpoint_files import check


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def write(folder, alone, *steps, keep=3, last=None):
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        last = checkpoints.save(
            alone, step=step, model=nn.Linear(1, 1).state_dict(), training={"x": step}, rank_state={}, last=last
        )
    checkpoints.release()
    return last


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


# What the second line goes on from, the steps that it writes, and then: what is in the folder, and what is set aside.
LINES = {
    "from the start, below": (None, [1, 2], [1, 2], [10, 11, 12]),
    "from the start, above": (None, [20], [20], [10, 11, 12]),
    "from the start, the same steps": (None, [10, 11], [10, 11], [10, 11, 12]),
    "from an older one": (10, [11, 12], [10, 11, 12], [11, 12]),
    "from an older one, over keep": (11, [12, 13, 14], [12, 13, 14], [12]),
    "from the newest": (12, [13], [11, 12, 13], None),
    "from the newest, written again": (12, [12], [10, 11, 12], None),
}


@pytest.mark.parametrize("case", LINES)
def test_a_new_line_deletes_nothing_of_the_old_one_and_is_what_is_resumed(folder, alone, case):
    start, steps, here, aside = LINES[case]
    write(folder, alone, 10, 11, 12)
    write(folder, alone, *steps, last=None if start is None else str(folder / f"step-{start:08d}"))
    assert names(folder) == [f"step-{step:08d}" for step in here]
    assert Checkpoints(folder).latest().step == steps[-1]
    beside = folder.with_name("checkpoints.1")
    assert beside.exists() == (aside is not None)
    if aside is not None:
        assert [check(beside / name).step for name in names(beside)] == aside


def test_each_line_gets_a_folder_of_its_own(folder, alone):
    for step in (5, 4, 3):
        write(folder, alone, step)
    assert [names(folder.with_name(f"checkpoints{n}")) for n in ("", ".1", ".2")] == [
        ["step-00000003"],
        ["step-00000005"],
        ["step-00000004"],
    ]


def test_steps_are_ordered_as_numbers(folder, alone):
    write(folder, alone, 99_999_999, 100_000_000, 100_000_001, keep=2)
    assert names(folder) == ["step-100000000", "step-100000001"]
    assert Checkpoints(folder).latest().step == 100_000_001


def test_a_new_line_counts_from_its_start_and_not_from_its_first_checkpoint(folder, alone):
    write(folder, alone, 10)
    (folder.parent / "metrics.jsonl").write_text("of the old line")
    checkpoints = Checkpoints(folder)
    said = checkpoints.begin(None, beside=[folder.parent / "metrics.jsonl", folder.parent / "no such file"])
    assert "checkpoints.1: step-00000010 of a line that this run does not go on with" in said
    assert checkpoints.latest() is None  # and not step 10
    assert names(folder.with_name("checkpoints.1")) == ["metrics.jsonl", "step-00000010"]
    assert checkpoints.begin(None) == ""


@pytest.mark.parametrize("moved", [None, 0, 1, 2])  # None: somebody has deleted the empty folder meanwhile
def test_who_was_killed_while_setting_aside_has_done_it_all_the_same(folder, alone, moved):
    write(folder, alone, 10, 11, 12)
    aside = folder.with_name("checkpoints.1")
    if moved is not None:
        aside.mkdir()
    (folder / descent._NOTE).write_text(
        json.dumps({"to": "../checkpoints.1", "names": ["step-00000011", "step-00000012"]})
    )
    for name in ("step-00000011", "step-00000012")[: moved or 0]:
        (folder / name).rename(aside / name)
    assert list(descent.steps(folder)) == [10]
    assert Checkpoints(folder).latest().step == 10
    assert names(aside) == ["step-00000011", "step-00000012"]
    assert not (folder / descent._NOTE).exists()


def test_where_nothing_can_be_made_beside_it_is_made_inside(folder, alone, monkeypatch):
    write(folder, alone, 10)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder.parent and access(path, mode))
    write(folder, alone, 1)
    assert names(folder) == ["aside.1", "step-00000001"]
    assert names(folder / "aside.1") == ["step-00000010"]


def test_what_is_no_plain_file_is_not_waited_for_and_not_copied(folder, alone):
    write(folder, alone, 1)
    fifo = folder.parent / "metrics.jsonl"
    os.mkfifo(fifo)
    (folder.parent / "config.yaml").mkdir()
    target, moved = descent.set_aside(folder, after=None, beside=(fifo, folder.parent / "config.yaml"))
    assert moved == ["step-00000001"]
    assert [path.name for path in target.iterdir()] == moved
