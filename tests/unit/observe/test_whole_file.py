"""Files whole or not at all."""

from __future__ import annotations

import pytest

from hvdtrain.errors import OutputError
from hvdtrain.observe.whole_file import check_writable, write_whole


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    file = tmp_path / "deep" / "a.txt"
    write_whole(file, "old")
    write_whole(file, "é\n")
    assert file.read_text(encoding="utf-8") == "é\n"
    assert list(file.parent.iterdir()) == [file]


def test_what_cannot_be_replaced_is_an_error_and_leaves_nothing_beside(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match=r"could not write .*/a: Is a directory; .*--run-dir"):
        write_whole(tmp_path / "a", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_could_be_written_is_seen_before_and_nothing_is_left(tmp_path):
    there = tmp_path / "old.json"
    there.write_text("old")
    for file in (there, tmp_path / "deep" / "new.json"):
        check_writable(file, remedy="choose another --out")
    assert there.read_text() == "old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "old.json"]


def test_what_could_not_be_written_is_refused_before(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for file, why in (
        (tmp_path / "file" / "x.json", "(Not a directory|File exists)"),
        (tmp_path / "folder", "it is a folder"),
    ):
        with pytest.raises(OutputError, match=f"could not write {file}: {why}; choose another --out"):
            check_writable(file, remedy="choose another --out")
