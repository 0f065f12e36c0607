"""Small texts from every rank beside the engine, several ranks in one process over a real store."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watching import Ranks, until

from hvdtrain.errors import CollectiveError, LaunchError, RankFailure
from hvdtrain.ranks.everyone import assemble, exchange
from hvdtrain.ranks.watch import NullWatch


def everywhere(ranks, call, members=(0, 1, 2)):
    """What ``call(rank, store, watch)`` returns or raises on each of the members, all at once."""
    outcome: dict[int, object] = {}

    def run(rank: int) -> None:
        try:
            outcome[rank] = call(rank, ranks.stores[rank], ranks.watches[rank])
        except Exception as error:
            outcome[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcome


def texts(key="k", timeout_s=20.0, text="from {}", what="a test"):
    return lambda rank, store, watch: exchange(
        store, watch, key, text.format(rank), rank=rank, world_size=3, timeout_s=timeout_s, what=what
    )


def test_every_rank_gets_the_texts_of_all_in_rank_order(ranks):
    for number in range(20):
        found = everywhere(ranks, texts(f"k{number}", text=f"{number} from {{}}"))
        assert all(found[rank] == [f"{number} from {other}" for other in range(3)] for rank in range(3))
    assert ranks.ended == {}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(), min_size=2, max_size=2))
def test_any_text_arrives_as_it_was(said):
    ranks = Ranks(2)
    try:
        found = everywhere(
            ranks,
            lambda rank, store, watch: exchange(
                store, watch, "any", said[rank], rank=rank, world_size=2, timeout_s=20, what="a test"
            ),
            members=(0, 1),
        )
        assert found == {0: said, 1: said}
    finally:
        ranks.close()


def test_a_world_of_one_asks_nobody():
    assert exchange(None, NullWatch(), "k", "mine", rank=0, world_size=1, timeout_s=1, what="a test") == ["mine"]


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_rank_that_waits_in_what_the_others_have_not_begun_is_named_long_before_the_time_out(ranks, absent):
    with ranks.watches[absent].region("world", "all_reduce of 4 bytes", range(3)):
        time.sleep(0.2)  # its record says so
        began = time.monotonic()
        found = everywhere(ranks, texts(timeout_s=20), [rank for rank in range(3) if rank != absent])
    assert time.monotonic() - began < 5
    for rank, error in found.items():
        assert isinstance(error, CollectiveError)
        assert f"rank {rank} is at a test, and rank {absent} on " in str(error)
        assert "is not: it waits in all_reduce of 4 bytes; every rank must make the same" in str(error)


@pytest.mark.parametrize("of_two", [False, True])
def test_a_rank_in_what_can_end_without_the_others_is_waited_for_and_named_with_it(ranks, of_two, monkeypatch):
    monkeypatch.setattr("hvdtrain.ranks.everyone._LOOK_S", 0.05)
    label, members = ("group", range(1, 3)) if of_two else ("world", range(3))
    for rank in members if not of_two else ():  # all have begun it; one is still in it
        with ranks.watches[rank].region(label, "all_reduce of 4 bytes", members):
            pass
    with ranks.watches[2].region(label, "all_reduce of 4 bytes", members, again=not of_two):
        time.sleep(0.2)
        found = everywhere(ranks, texts(timeout_s=0.5), [0])
    assert "rank 0 waited 0.5 s for ranks 1, 2 in a test; missing: rank 1 on " in str(found[0])
    assert "(in all_reduce of 4 bytes;" in str(found[0])


def test_several_absent_ranks_are_all_named(ranks):
    found = everywhere(ranks, texts(timeout_s=0.3), [1])
    assert "for ranks 0, 2 in a test" in str(found[1])


def test_a_failure_elsewhere_ends_the_wait_at_once(ranks):
    failing = threading.Timer(0.3, lambda: ranks.watches[2].words.report("ValueError: planted", "its traceback"))
    failing.start()
    began = time.monotonic()
    found = everywhere(ranks, texts(timeout_s=20), [0, 1])
    assert time.monotonic() - began < 3
    for error in found.values():
        assert isinstance(error, RankFailure)
        assert (error.rank, error.rank_traceback) == (2, "its traceback")


def test_a_rank_that_has_left_is_named_long_before_the_time_out(ranks, monkeypatch):
    monkeypatch.setattr("hvdtrain.ranks.watch._STUCK_S", 0.2)

    def leave() -> None:
        with pytest.raises(RankFailure):
            ranks.watches[2].leave(20)

    leaving = threading.Thread(target=leave)
    leaving.start()
    time.sleep(0.2)
    began = time.monotonic()
    found = everywhere(ranks, texts(timeout_s=20), [0, 1])
    assert time.monotonic() - began < 5
    assert any(isinstance(error, CollectiveError) for error in found.values())  # the one that noticed
    for error in found.values():
        assert "rank 2" in str(error)
        assert "has left the program" in str(error)
        assert "in a test" in str(error)
    leaving.join(20)


def test_the_watch_goes_on_while_a_rank_waits_over_its_connection(ranks):
    waiting = threading.Thread(target=lambda: everywhere(ranks, texts(), [1]))
    waiting.start()
    time.sleep(0.3)
    began = time.monotonic()
    ranks.watches[2].words.report("ValueError: planted", "")
    until(lambda: ranks.watches[1].failure is not None)
    assert time.monotonic() - began < 2
    waiting.join(20)
    assert not waiting.is_alive()


def assembled(mine):
    return lambda rank, store, watch: assemble(store, watch, mine(rank), rank=rank, world_size=3, timeout_s=5)


def test_ranks_with_the_same_software_go_on(ranks):
    found = everywhere(ranks, assembled(lambda rank: {"torch": "2.13.0", "Horovod": "0.28.1, MPI, no NCCL"}))
    assert found == {0: None, 1: None, 2: None}


def test_other_software_is_named_by_the_rank_that_has_it_and_by_rank_zero(ranks):
    found = everywhere(ranks, assembled(lambda rank: {"torch": "2.13.0" if rank < 2 else "2.4.0"}))
    assert isinstance(found[0], LaunchError)
    assert isinstance(found[2], LaunchError)
    assert found[1] is None  # it is like rank 0, and hears of the failure from those two
    for words in ("torch 2.4.0", "torch 2.13.0", "install the same on every host", "rank 2 on", "rank 0 on"):
        assert words in str(found[0])
        assert words in str(found[2])


def test_a_rank_that_never_starts_is_a_launch_error(ranks):
    found = everywhere(
        ranks,
        lambda rank, store, watch: assemble(store, watch, {}, rank=rank, world_size=3, timeout_s=0.3),
        members=(0, 2),
    )
    for error in found.values():
        assert isinstance(error, LaunchError)
        assert "waited 0.3 s for rank 1 in the start" in str(error)
