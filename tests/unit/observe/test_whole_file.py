"""Files whole or not at all."""

from __future__ import annotations

import pytest

from hvdtrain.errors import OutputError
from hvdtrain.observe.whole_file import write_whole


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
