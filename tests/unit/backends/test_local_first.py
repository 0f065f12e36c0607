"""On each node one rank goes first: several ranks of several nodes as threads over a real store."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hvdtrain.backends.local_first import LocalFirst
from hvdtrain.errors import CollectiveError, RankFailure
from hvdtrain.ranks.last_words import Failure
from hvdtrain.ranks.rendezvous import dial, serve
from hvdtrain.ranks.store import Store
from hvdtrain.ranks.watch import NullWatch
from hvdtrain.topology import Topology


@pytest.fixture
def store():
    return Store()


def place(rank, *, per_node=2, nodes=2, launcher="torchrun"):
    return Topology(
        rank=rank,
        world_size=per_node * nodes,
        local_rank=rank % per_node,
        local_world_size=per_node,
        node_rank=rank // per_node,
        num_nodes=nodes,
        launcher=launcher,
    )


def test_nodes_do_not_wait_for_each_other(store):
    zero, one, two, three = (LocalFirst(store, place(rank), NullWatch()) for rank in range(4))
    entered = threading.Event()

    def other_node():
        with two.block(10):
            pass
        with three.block(10):
            entered.set()

    with zero.block(10), ThreadPoolExecutor(1) as pool:
        pool.submit(other_node).result(timeout=10)
    assert entered.is_set()
    with one.block(10):
        pass


def test_two_nodes_on_one_host_are_kept_apart_where_the_launcher_numbers_them(store):
    _, one, two, _ = (LocalFirst(store, place(rank), NullWatch()) for rank in range(4))
    with two.block(10):
        pass
    late = pytest.raises(CollectiveError, match=r"rank 1 waited 0\.1 s for rank 0, the first on node 0")
    with late, one.block(0.1):
        pass


def test_a_node_is_its_host_where_the_launcher_does_not_number_nodes(store, monkeypatch):
    """Ranks dealt out in turns: ranks 0 and 2 on one host, 1 and 3 on the other, the node's number derived wrongly."""
    made = {}
    for rank, host, local in ((0, "a", 0), (1, "b", 0), (2, "a", 1), (3, "b", 1)):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        topology = Topology(
            rank=rank, world_size=4, local_rank=local, local_world_size=2, node_rank=rank // 2, num_nodes=2, launcher="mpirun"
        )  # fmt: skip
        made[rank] = LocalFirst(store, topology, NullWatch())
    with made[0].block(10):
        pass
    with made[2].block(10):  # rank 1 has not begun
        pass
    with (
        pytest.raises(CollectiveError, match=r"rank 3 waited 0\.1 s for rank 1, the first on node b"),
        made[3].block(0.1),
    ):
        pass


def test_the_first_ends_before_the_others_begin_each_time(store):
    first, second = (LocalFirst(store, place(rank, nodes=1), NullWatch()) for rank in range(2))
    events = []

    def other():
        for _ in range(3):
            with second.block(10), second.block(10):
                events.append("second")

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(other)
        for turn in range(1, 4):
            with first.block(10):
                time.sleep(0.02)
                with first.block(10):
                    events.append("first")
                assert events.count("second") < turn
        done.result(timeout=10)
    assert events.count("first") == events.count("second") == 3


class Heard(NullWatch):
    """A watch that hears of a failure of ``rank``."""

    def __init__(self, rank):
        super().__init__()
        self.words.first = Failure(rank=rank, host="here", message="ValueError: planted", traceback="lines")

    def raise_if_failed(self):
        if self.failure.rank == 0:
            raise RankFailure("rank 0 on here failed first: ValueError: planted", rank=0, rank_traceback="lines")


def fails(first):
    with pytest.raises(ValueError, match="planted"), first.block(10):
        raise ValueError("planted")


def test_an_exception_of_the_first_ends_the_wait_of_the_others_by_its_name(store):
    first, second = (LocalFirst(store, place(rank, nodes=1), NullWatch()) for rank in range(2))
    fails(first)
    with pytest.raises(CollectiveError, match="local rank 0 on node 0 failed: ValueError: planted"), second.block(10):
        pass


@pytest.mark.parametrize(
    ("rank", "kind"), [(0, RankFailure), (1, CollectiveError)], ids=["it failed", "it left, as this rank has found"]
)
def test_a_failure_that_the_watch_hears_of_ends_the_wait(store, rank, kind):
    LocalFirst(store, place(0, nodes=1), NullWatch())
    second = LocalFirst(store, place(1, nodes=1), Heard(rank))
    began = time.monotonic()
    with pytest.raises(kind, match="planted"), second.block(30):
        pass
    assert time.monotonic() - began < 5


def test_a_store_that_is_gone_is_named():
    process, found = serve(one_node=True, job="test")
    stores = [dial(found, "test", rank, 10) for rank in range(2)]
    LocalFirst(stores[0], place(0, nodes=1), NullWatch())
    second = LocalFirst(stores[1], place(1, nodes=1), NullWatch())
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    with pytest.raises(CollectiveError, match="rank 1 lost the connection to rank 0's store"), second.block(20):
        pass


def test_an_exception_of_the_first_survives_a_store_that_is_gone():
    process, found = serve(one_node=True, job="test")
    first = LocalFirst(dial(found, "test", 0, 10), place(0, nodes=1), NullWatch())

    def fail():
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"), first.block(10):
        fail()
