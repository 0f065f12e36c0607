"""Files whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hvdtrain.errors import OutputError
from hvdtrain.observe.whole_file import check_writable, write_output, write_whole


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


def test_what_somebody_typed_is_written_into_where_it_is_no_file_and_a_link_stays_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    check_writable(tmp_path / "pipe", remedy="x")
    write_output(tmp_path / "pipe", "said", remedy="x")
    assert os.read(reader, 100) == b"said"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "link").symlink_to("file")
    for text in ("one", "two"):
        write_output(tmp_path / "link", text, remedy="x")
        assert (tmp_path / "file").read_text() == text
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "null").symlink_to("/dev/null")
    check_writable(tmp_path / "null", remedy="x")
    write_output(tmp_path / "null", "gone", remedy="x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(OutputError, match=f"could not write {full}: No space left on device; choose another --out"):
        write_output(full, "x", remedy="choose another --out")
