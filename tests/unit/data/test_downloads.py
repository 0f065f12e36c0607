"""One process of a node downloads and the others wait: real processes, a real server, real locks."""

from __future__ import annotations

import gzip
import hashlib
import io
import multiprocessing
import os
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from serving import Served, serve

from hvdtrain.data import downloads
from hvdtrain.data.downloads import Archive, fetch_and_unpack, is_intact, once_per_node
from hvdtrain.errors import DataError

CONTENT = bytes(range(256)) * 400
PROCESSES = multiprocessing.get_context("spawn")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(tmp_path / "server") as served:
        yield served


def publish(served: Served, name: str = "letters.gz", content: bytes = CONTENT) -> Archive:
    packed = gzip.compress(content)
    (served.folder / name).write_bytes(packed)
    return Archive(
        name=f"Letters/raw/{name}",
        sha256=hashlib.sha256(packed).hexdigest(),
        urls=(f"{served.url}/{name}",),
        contents=(f"Letters/raw/{name.removesuffix('.gz')}",),
    )


def ask(archive: Archive, folder: Path, timeout_s: float = 60) -> str:
    """What a rank does; returns its error."""
    (folder / f"asking-{os.getpid()}").touch()
    try:
        once_per_node(
            "letters",
            folder,
            is_there=(folder / archive.contents[0]).is_file,
            get=lambda: fetch_and_unpack([archive], folder),
            timeout_s=timeout_s,
        )
    except DataError as error:
        return str(error)
    return ""


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def asking(folder: Path) -> int:
    return len(list(folder.glob("asking-*")))


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.glob(".*")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


def test_of_many_processes_one_downloads_and_all_find_the_file(server: Served, folder: Path) -> None:
    archive = publish(server)
    server.open.clear()
    with ProcessPoolExecutor(4, mp_context=PROCESSES) as pool:
        ranks = [pool.submit(ask, archive, folder) for _ in range(4)]
        until(lambda: asking(folder) == 4, "four processes ask")
        assert not (folder / archive.contents[0]).exists()
        server.open.set()
        assert [rank.result(60) for rank in ranks] == [""] * 4
    assert server.requests == {"letters.gz": 1}
    assert (folder / archive.contents[0]).read_bytes() == CONTENT
    assert hidden(folder) == {".hvdtrain-letters.lock"}


def test_a_failed_download_is_told_to_those_who_waited_and_the_next_attempt_works(server: Served, folder: Path) -> None:
    archive = publish(server)
    kept = (server.folder / "letters.gz").rename(server.folder / "elsewhere")
    server.open.clear()
    with ProcessPoolExecutor(3, mp_context=PROCESSES) as pool:
        ranks = [pool.submit(ask, archive, folder) for _ in range(3)]
        until(lambda: asking(folder) == 3, "three processes ask")
        time.sleep(0.3)
        server.open.set()
        told = {rank.result(60) for rank in ranks}
    assert len(told) == 1
    assert "letters.gz: HTTP Error 404" in told.pop()
    assert server.requests == {"letters.gz": 1}
    assert "404" in ask(archive, folder)  # a later attempt does not trust the earlier failure, but tries
    assert server.requests == {"letters.gz": 2}
    kept.rename(server.folder / "letters.gz")
    assert ask(archive, folder) == ""
    assert (folder / archive.contents[0]).read_bytes() == CONTENT
    assert hidden(folder) == {".hvdtrain-letters.lock"}


def test_when_the_downloading_process_is_killed_another_one_takes_over(server: Served, folder: Path) -> None:
    archive = publish(server)
    server.open.clear()
    first = PROCESSES.Process(target=ask, args=(archive, folder))
    first.start()
    try:
        until(lambda: server.requests["letters.gz"] == 1, "the first process downloads")
        with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
            second = pool.submit(ask, archive, folder)
            until(lambda: asking(folder) == 2, "the second process asks")
            time.sleep(0.2)
            first.kill()
            until(lambda: server.requests["letters.gz"] == 2, "the second process downloads")
            server.open.set()
            assert second.result(60) == ""
    finally:
        first.kill()
        first.join()
    assert (folder / archive.contents[0]).read_bytes() == CONTENT
    assert hidden(folder) == {".hvdtrain-letters.lock"}


def test_the_wait_for_another_process_is_bounded(server: Served, folder: Path) -> None:
    archive = publish(server)
    server.open.clear()
    first = PROCESSES.Process(target=ask, args=(archive, folder))
    first.start()
    try:
        until(lambda: server.requests["letters.gz"] == 1, "the first process downloads")
        began = time.monotonic()
        told = ask(archive, folder, timeout_s=0.5)
        assert 0.5 <= time.monotonic() - began < 5
        assert told.startswith("waited 0.5 s for another process to download letters")
        assert "--timeout" in told
    finally:
        first.kill()
        first.join()


def test_what_a_killed_download_left_is_cleared_away(server: Served, folder: Path) -> None:
    archive = publish(server)
    (folder / ".hvdtrain-partial" / "unpacked" / "Letters").mkdir(parents=True)
    (folder / ".hvdtrain-partial" / "letters.gz").write_bytes(b"half")
    assert ask(archive, folder) == ""
    assert hidden(folder) == {".hvdtrain-letters.lock"}
    assert [path.name for path in (folder / "Letters").rglob("*") if path.is_file()] == ["letters"]


def test_the_next_place_is_tried_when_one_has_another_file_or_none(server: Served, folder: Path) -> None:
    archive = publish(server)
    (server.folder / "other").mkdir()
    (server.folder / "other" / "letters.gz").write_bytes(b"<html>please log in</html>")
    places = ("no URL at all", f"{server.url}/none/letters.gz", f"{server.url}/other/letters.gz")
    several = Archive(
        name=archive.name, sha256=archive.sha256, urls=(*places, *archive.urls), contents=archive.contents
    )
    fetch_and_unpack([several], folder)
    assert (folder / archive.contents[0]).read_bytes() == CONTENT
    wrong = Archive(name=archive.name, sha256=archive.sha256, urls=places, contents=("other",))
    with pytest.raises(DataError) as told:
        fetch_and_unpack([wrong], folder)
    for words in (
        "no URL at all: unknown url type",
        "none/letters.gz: HTTP Error 404",
        "not the expected file (26 bytes",
    ):
        assert words in str(told.value)


def test_a_file_url_serves_as_a_mirror(server: Served, folder: Path) -> None:
    archive = publish(server)
    local = Archive(
        name=archive.name,
        sha256=archive.sha256,
        urls=((server.folder / "letters.gz").as_uri(),),
        contents=archive.contents,
    )
    fetch_and_unpack([local], folder)
    assert (folder / archive.contents[0]).read_bytes() == CONTENT


def test_an_archive_placed_by_hand_is_used_and_kept(server: Served, folder: Path) -> None:
    archive = publish(server)
    placed = folder / archive.name
    placed.parent.mkdir(parents=True)
    placed.write_bytes((server.folder / "letters.gz").read_bytes())
    assert ask(archive, folder) == ""
    assert not server.requests
    assert placed.is_file()


def test_a_damaged_archive_placed_by_hand_is_not_used(server: Served, folder: Path) -> None:
    archive = publish(server)
    placed = folder / archive.name
    placed.parent.mkdir(parents=True)
    placed.write_bytes(b"damaged")
    assert ask(archive, folder) == ""
    assert server.requests == {"letters.gz": 1}


def test_a_server_that_says_nothing_is_given_up(server: Served, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = publish(server)
    server.open.clear()
    monkeypatch.setattr(downloads, "_SILENCE_S", 0.3)
    began = time.monotonic()
    with pytest.raises(DataError, match="timed out"):
        fetch_and_unpack([archive], folder)
    assert time.monotonic() - began < 5


def tar(server: Served, *names: str) -> Archive:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(CONTENT)
            packed.addfile(member, io.BytesIO(CONTENT))
    (server.folder / "all.tar.gz").write_bytes(buffer.getvalue())
    return Archive(
        name="all.tar.gz",
        sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        urls=(f"{server.url}/all.tar.gz",),
        contents=names,
    )


def test_a_tar_archive_is_unpacked_whole(server: Served, folder: Path) -> None:
    fetch_and_unpack([tar(server, "batches/1", "batches/2")], folder)
    assert [(folder / "batches" / name).read_bytes() for name in "12"] == [CONTENT] * 2


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python is older than 3.10.12")
def test_a_tar_archive_that_writes_elsewhere_is_refused(server: Served, folder: Path) -> None:
    with pytest.raises(DataError, match="cannot be unpacked"):
        fetch_and_unpack([tar(server, "../../outside")], folder)
    assert not (folder.parent / "outside").exists()


def test_an_archive_that_cannot_be_unpacked_is_named(server: Served, folder: Path) -> None:
    archive = publish(server)
    for damaged in (b"no gzip", gzip.compress(CONTENT)[:-20]):
        (server.folder / "letters.gz").write_bytes(damaged)
        named = Archive(
            name=archive.name,
            sha256=hashlib.sha256(damaged).hexdigest(),
            urls=archive.urls,
            contents=archive.contents,
        )
        with pytest.raises(DataError, match=r"letters\.gz cannot be unpacked"):
            fetch_and_unpack([named], folder)
        assert not (folder / archive.contents[0]).exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot use .*file.*--data-dir"):
        once_per_node("letters", tmp_path / "file", is_there=lambda: True, get=lambda: None, timeout_s=1)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_written_to_serves_what_it_has() -> None:
    folder = Path("/sys/kernel")
    once_per_node("letters", folder, is_there=lambda: True, get=lambda: None, timeout_s=1)
    with pytest.raises(DataError, match="letters is not in /sys/kernel, which cannot be written to"):
        once_per_node("letters", folder, is_there=lambda: False, get=lambda: None, timeout_s=1)


def test_only_a_whole_file_is_intact(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert not is_intact(file, "")
    file.write_bytes(CONTENT)
    assert is_intact(file, hashlib.sha256(CONTENT).hexdigest())
    assert not is_intact(file, hashlib.sha256(b"other").hexdigest())
