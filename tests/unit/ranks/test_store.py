"""The ranks' store in its own process: what it answers, that it always answers in time or is lost, and whom it lets in."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import struct
import threading
import time
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watching import until

from hvdtrain.ranks import frames
from hvdtrain.ranks.process_state import Process
from hvdtrain.ranks.rendezvous import dial, serve
from hvdtrain.ranks.store import Address, RemoteStore, Store, StoreLost, StoreSilent


class Job:
    """A store's process, and its ranks' connections."""

    def __init__(self, one_node=True):
        self.process, self.place = serve(one_node=one_node, job="test")
        self.secret = bytes.fromhex(self.place["secret"])
        self.stores = []

    def rank(self, number=0, **options):
        store = dial(self.place, "test", number, 10.0)
        self.stores.append(store)
        return store

    def knock(self):
        """A connection of somebody who has not said anything yet."""
        if self.place["path"]:
            connected = socket.socket(socket.AF_UNIX)
            connected.connect(self.place["path"])
        else:
            connected = socket.create_connection(("127.0.0.1", self.place["port"]))
        connected.settimeout(10)
        return connected

    def end(self):
        for store in self.stores:
            store.close()
        self.process.wait(10)


@pytest.fixture(params=[True, False], ids=["one node", "several"])
def job(request):
    made = Job(request.param)
    yield made
    made.end()


@pytest.fixture
def local():
    made = Job()
    yield made
    made.end()


@contextmanager
def stopped(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_it_answers_as_one_in_this_process_does(local):
    for store in (Store(), local.rank(), local.rank().under("part").under("of it")):
        assert not store.check(["a"])
        store.set("a", "text")
        store.set("b", bytes(range(256)))
        assert store.check(["a", "b"])
        assert (store.get("a"), store.get("b")) == (b"text", bytes(range(256)))
        assert store.compare_set("c", "", "first") == b"first"
        assert store.compare_set("c", "", "second") == b"first"
        assert store.compare_set("c", "first", "third") == b"third"
        assert [store.add("n", 2), store.add("n", 3)] == [2, 5]
        store.append("a", "s")
        assert store.get("a") == b"texts"
        assert store.delete_key("a")
        assert not store.delete_key("a")
        with pytest.raises(KeyError):
            store.get("a")


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), st.binary(), max_size=5))
def test_any_value_comes_back_as_it_was(content):
    job = Job()
    try:
        one, other = job.rank(0), job.rank(1)
        for key, value in content.items():
            one.set(key, value)
        assert {key: other.get(key) for key in content} == content
    finally:
        job.end()


def test_a_large_value_arrives_and_holds_up_no_other_rank(job):
    one, two = job.rank(0), job.rank(1)
    one.set("large", b"x" * 30_000_000)
    thread = threading.Thread(target=lambda: one.get("large"))
    thread.start()
    two.set("small", "1")
    thread.join(30)
    assert len(two.get("large")) == 30_000_000


def test_a_stopped_store_is_silent_and_later_answers_what_was_asked_then(job):
    store = job.rank()
    store.set("a", "1")
    with stopped(job.process.pid):
        began = time.monotonic()
        for key in ("b", "c"):
            with pytest.raises(StoreSilent, match=r"no answer from the ranks' store at .* within 0\.3 s"):
                store.ask(["set", key, "2"], within_s=0.3)
        assert time.monotonic() - began < 3
        with pytest.raises(StoreLost):
            RemoteStore(store.address, job.secret, 1, answer_s=0.3)
    assert store.get("a") == b"1"
    assert store.check(["b", "c"])


def test_a_thread_that_waits_for_a_stopped_store_holds_up_no_other_thread(local):
    store = local.rank()
    with stopped(local.process.pid):
        thread = threading.Thread(target=lambda: store.check(["a"]))
        thread.start()
        time.sleep(0.1)
        began = time.monotonic()
        with pytest.raises(StoreSilent):
            store.ask(["check", ["a"]], within_s=0.2)
        assert time.monotonic() - began < 2
    thread.join(10)


def test_a_store_that_was_killed_is_lost_at_once(job):
    store = job.rank()
    os.kill(job.process.pid, signal.SIGKILL)
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(StoreLost, match=r"the connection to the ranks' store at .* was lost"):
            store.get("a")
    assert time.monotonic() - began < 3


def test_it_ends_itself_when_the_last_rank_has_gone_and_leaves_no_file(local):
    one, two = local.rank(0), local.rank(1)
    path = local.place["path"]
    process = Process(local.process.pid, int(_stat(local.process.pid)[19]), Process.here().place)
    one.close()
    two.set("a", "1")
    assert os.path.exists(path)
    two.close(farewell=False)
    until(process.is_gone)
    assert not os.path.exists(path)


def test_a_signal_for_the_job_does_not_end_it(local):
    store = local.rank()
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(local.process.pid, name)
    store.set("a", "1")


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "signal 9"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "signal 11"),
        (lambda: os._exit(3), "exit code 3"),
        (lambda: os._exit(0), "exit code 0"),
    ],
)
def test_it_knows_which_rank_has_ended_and_how_if_it_still_can_be_seen(local, end, how):
    watching = local.rank(0)
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()  # pytest's, which would print this process's end as its own
        kept = RemoteStore(watching.address, local.secret, 1, answer_s=10.0)
        if os.fork() == 0:  # a child of the rank, as loader processes are, which outlives it
            time.sleep(3)
            os._exit(0)
        kept.set("here", "1")
        time.sleep(0.2)
        end()
    until(lambda: watching.check(["here"]))
    began = time.monotonic()
    until(lambda: 1 in watching.lost())  # this process has not waited for it, so the kernel still shows it
    assert time.monotonic() - began < 2
    os.waitpid(pid, 0)
    assert watching.lost() in ({1: how}, {1: ""})


def test_a_rank_that_says_farewell_is_not_lost(local):
    one, two = local.rank(0), local.rank(1)
    two.close()
    time.sleep(0.3)
    assert one.lost() == {}


# -- whom it lets in ---------------------------------------------------------------------------------------------------


def test_somebody_without_the_secret_is_not_let_in(job):
    job.rank().set("a", "1")
    address = job.stores[0].address
    with pytest.raises(StoreLost, match="did not let this rank in"):
        RemoteStore(address, b"guessed", 1, answer_s=5.0)
    assert job.stores[0].lost() == {}


def test_something_that_listens_in_its_place_is_not_believed():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept = []

        def play():
            connected, _ = listener.accept()
            kept.append(connected)
            connected.sendall(frames.frame(frames.nonce()))
            connected.recv(10_000)
            connected.sendall(frames.frame(b"\0" * 32))

        threading.Thread(target=play, daemon=True).start()
        with pytest.raises(StoreLost, match="does not know this job's secret"):
            RemoteStore(Address(host="127.0.0.1", port=listener.getsockname()[1]), b"secret", 1, answer_s=5.0)
        kept[0].close()


GARBAGE = {
    "nothing": b"",
    "half a length": b"\0\0",
    "more than any greeting": struct.pack("!I", 5000),
    "as much as can be": b"\xff" * 100,
    "no JSON": frames.frame(b"\0" * 40),
    "no object": frames.frame(b"[]"),
    "no strings": frames.frame(b'{"nonce": 1, "who": 2, "proof": 3}'),
    "no proof": frames.frame(json.dumps({"nonce": "00" * 32, "who": "{}", "proof": "00" * 32}).encode()),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_whatever_a_stranger_sends_the_ranks_are_served(job, content):
    store = job.rank()
    with job.knock() as stranger:
        stranger.sendall(content)
        began = time.monotonic()
        store.set("a", "1")
        assert store.get("a") == b"1"
        assert time.monotonic() - began < 3


def test_strangers_that_say_nothing_cannot_use_up_its_connections(local):
    store = local.rank()
    strangers = [local.knock() for _ in range(400)]
    began = time.monotonic()
    store.set("a", "1")
    local.rank(1).get("a")
    assert time.monotonic() - began < 5
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("what", ["repeated", "changed", "from somebody else"])
def test_a_frame_that_was_not_sent_by_the_rank_ends_the_connection(job, what):
    job.rank(0)
    store = job.rank(1)
    store.set("a", "1")
    sign = store._signer.sign
    question = json.dumps([["set", "a", "2"]]).encode()
    if what == "repeated":
        sent = frames.frame(sign(question)[4:])
        store._socket.sendall(sent)
        store._next(time.monotonic() + 5)
    elif what == "changed":
        sent = sign(question).replace(b'"2"', b'"3"')
    else:
        sent = frames.Signer(b"x", b"x" * 32, b"y" * 32, listens=False).sign(question)
    store._socket.sendall(sent)
    with pytest.raises((ConnectionError, TimeoutError)):
        store._next(time.monotonic() + 5)
    assert job.stores[0].get("a") == (b"2" if what == "repeated" else b"1")


def _stat(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()
