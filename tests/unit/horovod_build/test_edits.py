"""Each edit is made exactly where its text stands, or none is made and the message says why."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from hvdtrain.errors import HvdtrainError
from hvdtrain.horovod_build.edits import CXX_STANDARD, EDITS, apply, digest


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder shaped as Horovod's sdist, whose files hold the lines that the edits are about."""
    texts = defaultdict(str)
    for edit in EDITS:
        texts[edit.file] += "".join(f"# line {number}\n{edit.old}\n" for number in range(edit.times))
    for name, text in texts.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_every_edit_is_made(source):
    apply(source, "0.28.1", 17)
    after = contents(source)
    for edit in EDITS:
        there, times = (edit.new, edit.times) if edit.new else (edit.old, 0)
        assert after[edit.file].count(there.replace(CXX_STANDARD, "17")) == times, edit.name


@pytest.mark.parametrize("standard", [17, 20])
def test_the_c_plus_plus_standard_is_the_one_asked_for(source, standard):
    apply(source, "0.28.1", standard)
    for file in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt"):
        assert f"set(CMAKE_CXX_STANDARD {standard})" in contents(source)[file]
        assert CXX_STANDARD not in contents(source)[file]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_a_text_that_is_not_there_stops_everything_and_is_named(source, edit):
    file = source / edit.file
    file.write_text(file.read_text().replace(edit.old, "something else", 1))
    before = contents(source)
    with pytest.raises(HvdtrainError) as caught:
        apply(source, "0.29.0", 17)
    message = str(caught.value)
    assert f"{edit.name!r}" in message
    assert edit.file in message
    assert "0.29.0" in message
    assert f"expected {edit.times} times, found {edit.times - 1}" in message
    assert contents(source) == before


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_a_text_that_is_there_too_often_stops_everything(source, edit):
    file = source / edit.file
    file.write_text(file.read_text() + edit.old)
    before = contents(source)
    with pytest.raises(HvdtrainError, match=rf"{re.escape(edit.name)}.*found {edit.times + 1}"):
        apply(source, "0.28.1", 17)
    assert contents(source) == before


def test_a_second_time_is_refused(source):
    apply(source, "0.28.1", 17)
    with pytest.raises(HvdtrainError, match="found 0"):
        apply(source, "0.28.1", 17)


def test_a_missing_file_is_named(source):
    (source / "setup.py").unlink()
    with pytest.raises(HvdtrainError, match=r"setup\.py of Horovod 0\.28\.1: the file cannot be read \(No such file"):
        apply(source, "0.28.1", 17)


def test_no_two_edits_have_one_name():
    assert len({edit.name for edit in EDITS}) == len(EDITS)


def test_the_digest_changes_with_any_edit():
    seen = {digest()}
    for field, value in (("old", "x"), ("new", "x"), ("file", "x"), ("times", 7)):
        seen.add(digest([replace(EDITS[0], **{field: value}), *EDITS[1:]]))
    assert len(seen) == 5
    assert digest([replace(EDITS[0], why="said better"), *EDITS[1:]]) == digest()
