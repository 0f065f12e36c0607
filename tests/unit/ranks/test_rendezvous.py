"""How ranks find each other's store: by file, by word of mouth, and never for longer than the time-out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from hvdtrain.errors import LaunchError
from hvdtrain.launch.detect import Detection
from hvdtrain.ranks import rendezvous
from hvdtrain.ranks.rendezvous_file import private_folder, rendezvous_file, sweep, write
from hvdtrain.topology import Topology


def detection(rank: int, size: int = 2, nodes: int = 1) -> Detection:
    local = size // nodes
    topology = Topology(
        rank=rank, world_size=size, local_rank=rank % local, local_world_size=local, node_rank=rank // local, num_nodes=nodes,
        launcher="mpirun",
    )  # fmt: skip
    return Detection(topology=topology, reason="a test", job_id="a-test", address=None, first_host=None)


def both(tell=None, nodes: int = 1):
    """Ranks 0 and 1 in two threads of this process, which count their meetings alike."""
    found: dict[int, object] = {}

    def rank(number: int) -> None:
        try:
            found[number] = rendezvous.meet(detection(number, nodes=nodes), 20, tell and tell(number))
        except LaunchError as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.fixture(autouse=True)
def _same_meeting(monkeypatch, tmp_path_factory):
    tmp_path_factory.getbasetemp()  # pytest's own is not to lie in what follows
    monkeypatch.setattr(
        rendezvous, "_meetings", iter([7] * 100)
    )  # two ranks in one process would count as two meetings
    with tempfile.TemporaryDirectory(
        dir="/tmp", prefix="t"
    ) as short:  # a path of a socket has about 100 characters at most
        monkeypatch.setenv("TMPDIR", short)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield


def talk(found) -> None:
    assert not any(isinstance(one, Exception) for one in found.values()), found
    found[0].store.set("greeting", "hello")
    assert found[1].store.get("greeting") == b"hello"
    for meeting in (found[1], found[0]):
        meeting.all_met()
        meeting.close()


def test_ranks_of_one_node_meet_through_a_private_file():
    found = both()
    file, socket = found[0].files
    assert file.stat().st_mode & 0o077 == 0
    assert socket.is_socket()
    assert file.parent.stat().st_mode & 0o077 == 0
    assert socket.parent.stat().st_mode & 0o077 == 0
    talk(found)
    assert not list(file.parent.iterdir())


def test_ranks_of_two_nodes_meet_by_what_they_are_told():
    box: list[dict] = []
    said = threading.Event()

    def tell(rank):
        def zero(content):
            box.append(content)
            said.set()
            return content

        def other(content):
            assert said.wait(20)
            return json.loads(json.dumps(box[0]))

        return zero if rank == 0 else other

    found = both(tell, nodes=2)
    assert found[0].files == ()
    talk(found)


def test_ranks_of_two_nodes_do_not_meet_with_different_secrets(monkeypatch):
    monkeypatch.setenv("HVDTRAIN_SECRET", "one")
    process, place = rendezvous.serve(one_node=False, job="a-test")
    assert place["secret"] == ""  # it does not travel
    monkeypatch.setenv("HVDTRAIN_SECRET", "another")
    with pytest.raises(LaunchError, match="is HVDTRAIN_SECRET the same on every host"):
        rendezvous.dial(place, "a-test", 1, 1.0)
    monkeypatch.delenv("HVDTRAIN_SECRET")
    with pytest.raises(LaunchError, match=r"has HVDTRAIN_SECRET, and this rank has not"):
        rendezvous.dial(place, "a-test", 1, 1.0)
    monkeypatch.setenv("HVDTRAIN_SECRET", "one")
    rendezvous.dial(place, "a-test", 1, 5.0).close()
    process.wait(10)


def test_a_file_that_somebody_else_could_have_written_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setenv("HVDTRAIN_RENDEZVOUS_DIR", str(tmp_path))
    file = rendezvous_file(detection(1, nodes=2))
    file.write_text("{}")
    file.chmod(0o666)
    with pytest.raises(LaunchError, match=r"must belong to you and be private \(mode 0600\); .* mode 0666"):
        rendezvous.meet(detection(1, nodes=2), 5.0)
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LaunchError, match="it cannot be read: "):
        rendezvous.meet(detection(1, nodes=2), 1.0)


def test_a_stale_file_of_an_earlier_job_is_not_believed(tmp_path):
    file = rendezvous_file(detection(1))
    write(file, {"path": "", "hosts": ["127.0.0.1"], "port": 9, "secret": "00", "of": "here"})
    began = time.monotonic()
    with pytest.raises(
        LaunchError, match=r"waited 1\.5 s for rank 0's address .*port 9, where rank 0's store does not answer"
    ):
        rendezvous.meet(detection(1), 1.5)
    assert time.monotonic() - began < 10
    talk(both())


def test_a_rank_without_rank_zero_waits_no_longer_than_the_time_out():
    began = time.monotonic()
    with pytest.raises(LaunchError, match=r"it did not appear\. Did rank 0 start"):
        rendezvous.meet(detection(1), 1.0)
    assert time.monotonic() - began < 5


def test_an_address_that_cannot_be_reached_names_both_hosts_and_the_ways_out():
    content = {"path": "", "hosts": ["127.0.0.1"], "port": 9, "secret": "00", "of": "elsewhere"}
    with pytest.raises(
        LaunchError, match=r"reaches rank 0 on elsewhere at none of 127\.0\.0\.1 port 9: open the ports"
    ):
        rendezvous.meet(detection(1, nodes=2), 1.0, lambda _: content)


STARTER = """
import sys
from pathlib import Path
from hvdtrain.ranks.rendezvous import serve
from hvdtrain.ranks.rendezvous_file import private_folder, write
file = private_folder() / "job.json"
write(file, serve(one_node=True, job="job", file=file)[1])
print("there", flush=True)
sys.stdin.read()
"""


def test_a_store_whose_starter_is_killed_before_anyone_came_goes_with_its_files():
    with subprocess.Popen(
        [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout.readline() == "there\n"
        folder = private_folder()
        assert len(list(folder.iterdir())) == 2
        starter.kill()
        end = time.monotonic() + 20
        while list(folder.iterdir()) and time.monotonic() < end:
            time.sleep(0.1)
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("heard", [True, False])
def test_what_killed_jobs_left_is_removed_by_a_later_one_and_nothing_else(old, heard):
    folder = private_folder()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "a.store"))
        if heard:
            listener.listen(1)
        write(folder / "a.json", {"path": str(folder / "a.store"), "secret": ""})
        write(folder / "by_port.json", {"path": "", "secret": ""})
        (folder / "of_somebody_else.txt").write_text("x")
        os.mkfifo(folder / "fifo.json", 0o600)
        (folder / "damaged.json").write_text("{")
        before = sorted(file.name for file in folder.iterdir())
        if old:
            for file in folder.iterdir():
                os.utime(file, (1, 1))
        sweep(folder)
        after = sorted(file.name for file in folder.iterdir())
    assert set(before) - set(after) == ({"a.store", "a.json"} if old and not heard else set())


def test_a_folder_that_others_may_read_is_refused():
    import os

    folder = Path(tempfile.gettempdir(), f"hvdtrain-{os.getuid()}")
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(LaunchError, match="must belong to you and be private"):
        rendezvous.meet(replace(detection(0)), 1.0)


class KeyValue(BaseHTTPRequestHandler):
    """What horovodrun's server does: PUT and GET, 404 for what is not there."""

    kept: dict = {}  # noqa: RUF012

    def do_PUT(self):
        self.kept[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        value = self.kept.get(self.path)
        self.send_response(200 if value else 404)
        self.send_header("Content-Length", str(len(value or b"")))
        self.end_headers()
        self.wfile.write(value or b"")

    def log_message(self, *_):
        pass


def test_horovodruns_server_carries_the_word(monkeypatch):
    with HTTPServer(("127.0.0.1", 0), KeyValue) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(rendezvous, "_announcements", iter([1] * 10))
        place = f"127.0.0.1:{server.server_port}"
        other = rendezvous.announce_by_horovodrun(place, 1, "job", 1.0)
        began = time.monotonic()
        with pytest.raises(LaunchError, match="rank 1 waited 1 s for rank 0's address from horovodrun"):
            other(None)
        assert time.monotonic() - began >= 1  # it asks again, until then
        rendezvous.announce_by_horovodrun(place, 0, "job", 5.0)({"port": 3, "secret": ""})
        assert rendezvous.announce_by_horovodrun(place, 1, "job", 5.0)(None) == {"port": 3, "secret": ""}
        server.shutdown()
