"""The source comes from a file, a folder or a repository, and what is no Horovod is refused."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile

import pytest

from hvdtrain.errors import ConfigError
from hvdtrain.horovod_build.failure import BuildError
from hvdtrain.horovod_build.running import Log
from hvdtrain.horovod_build.source import fetch


@pytest.fixture
def get(tmp_path):
    log = Log(tmp_path / "log")
    into = tmp_path / "into"
    into.mkdir()
    yield lambda where: fetch(str(where), into, environment=os.environ, log=log)
    log.close()


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "horovod-0.28.1"
    (folder / "horovod").mkdir(parents=True)
    (folder / "setup.py").write_text("")
    (folder / "horovod" / "__init__.py").write_text("from x import y\n\n__version__ = '0.28.1'\n")
    return folder


def packed(tree, path, mode="w:gz"):
    with tarfile.open(path, mode) as file:
        file.add(tree, arcname=tree.name)
    return path


def test_a_folder_is_copied_so_that_the_users_own_is_never_edited(tree, get):
    (tree / "build").mkdir()
    (tree / "build" / "old.o").write_text("")
    found = get(tree)
    assert found.version == "0.28.1"
    assert found.folder != tree
    (found.folder / "setup.py").write_text("changed")
    assert (tree / "setup.py").read_text() == ""
    assert not (found.folder / "build").exists()


def test_an_sdist_is_unpacked(tree, tmp_path, get):
    found = get(packed(tree, tmp_path / "horovod-0.28.1.tar.gz"))
    assert found.version == "0.28.1"
    assert (found.folder / "setup.py").is_file()


def test_a_zip_file_is_unpacked(tree, tmp_path, get):
    found = get(shutil.make_archive(str(tmp_path / "source"), "zip", tree.parent, tree.name))
    assert found.version == "0.28.1"


def test_the_name_tells_sources_apart_by_their_files(tree, tmp_path):
    names = set()
    for number, text in enumerate(["", "# another", ""]):
        (tree / "setup.py").write_text(text)
        into = tmp_path / f"into{number}"
        into.mkdir()
        log = Log(tmp_path / "log")
        names.add(fetch(str(tree), into, environment=os.environ, log=log).name)
        log.close()
    assert len(names) == 2
    assert all(name.startswith(str(tree)) for name in names)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_repository_is_cloned_at_its_revision(tree, tmp_path, get):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        subprocess.run(["git", *identity, *words], cwd=tree, check=True, capture_output=True, timeout=30)

    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    git("tag", "v1")
    (tree / "horovod" / "__init__.py").write_text("__version__ = '9.9'\n")
    git("commit", "-am", "two")
    assert get(f"git+file://{tree}@v1").version == "0.28.1"


def test_a_repository_that_is_not_there_is_named(tmp_path, get):
    with pytest.raises(BuildError, match=r"(?s)--source git\+file:///nowhere/x: git clone .* failed: fatal: .*Log: "):
        get("git+file:///nowhere/x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tree: (tree / "setup.py").unlink(), "holds no source of Horovod"),
        (lambda tree: shutil.rmtree(tree / "horovod"), "holds no source of Horovod"),
        (lambda tree: (tree / "horovod" / "__init__.py").write_text("x = 1"), "states no version"),
    ],
)
def test_what_is_no_horovod_is_refused(tree, get, make, message):
    make(tree)
    with pytest.raises(BuildError, match=message):
        get(tree)


def test_a_place_that_is_not_there_is_refused(tmp_path, get):
    with pytest.raises(ConfigError, match="is neither a file nor a folder"):
        get(tmp_path / "nothing")


def test_a_file_that_is_no_archive_is_refused(tmp_path, get):
    (tmp_path / "text.tar.gz").write_text("not an archive")
    with pytest.raises(BuildError, match="cannot be unpacked"):
        get(tmp_path / "text.tar.gz")


def test_a_truncated_archive_is_refused(tree, tmp_path, get):
    (tree / "big").write_bytes(os.urandom(100_000))
    whole = packed(tree, tmp_path / "horovod.tar.gz").read_bytes()
    (tmp_path / "half.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BuildError, match="cannot be unpacked"):
        get(tmp_path / "half.tar.gz")


def test_an_archive_that_writes_outside_its_folder_is_refused(tmp_path, get):
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as file:
        entry = tarfile.TarInfo("../../outside.txt")
        entry.size = 4
        file.addfile(entry, io.BytesIO(b"evil"))
    with pytest.raises(BuildError, match="cannot be unpacked"):
        get(tmp_path / "evil.tar.gz")
    assert not (tmp_path / "outside.txt").exists()


def test_an_sdist_that_is_not_the_published_one_is_refused_before_its_setup_runs(tree, tmp_path):
    ran = tmp_path / "ran"
    (tree / "setup.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    packed(tree, tmp_path / "horovod-0.28.1.tar.gz")
    into = tmp_path / "fetched"
    into.mkdir()
    log = Log(tmp_path / "log")
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    with pytest.raises(BuildError, match=r"is not the published file \(SHA-256 92a43f5a.*--source"):
        fetch(None, into, environment=environment, log=log)
    log.close()
    assert not ran.exists()
    assert not list(into.iterdir())
