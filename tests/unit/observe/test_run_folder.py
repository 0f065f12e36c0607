"""The folder of a run: refused early, made late."""

from __future__ import annotations

import os

import pytest

from hvdtrain.errors import ConfigError
from hvdtrain.observe import run_folder


def test_choosing_makes_nothing_and_making_makes_all_of_it(tmp_path):
    folder = run_folder.choose(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    run_folder.make(folder)
    run_folder.make(folder)
    assert folder.is_dir()
    assert run_folder.choose(str(folder)) == folder


def test_without_a_name_it_is_a_new_one_below_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run_folder.choose(None)
    assert folder.parent.name == "runs"
    assert folder.name.endswith(f"-{os.getpid()}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "run", "some/run"])
def test_a_folder_that_a_file_stands_in_the_way_of_is_refused(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--run-dir: nothing can be written in .*file.*Not a directory"):
        run_folder.choose(str(tmp_path / "file" / below))


@pytest.mark.parametrize("folder", ["/proc/self/run", "/sys/run"])
def test_a_folder_where_nobody_may_write_is_refused(folder):
    with pytest.raises(ConfigError, match="nothing can be written in"):
        run_folder.choose(folder)


def test_a_folder_that_cannot_be_made_after_all_is_refused_alike(tmp_path):
    folder = run_folder.choose(str(tmp_path / "a"))
    (tmp_path / "a").touch()
    with pytest.raises(ConfigError, match=r"nothing can be written in .*File exists"):
        run_folder.make(folder)
