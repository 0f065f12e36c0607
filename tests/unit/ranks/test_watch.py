"""The watch over a real store, several ranks in one process: who failed first, who is missing, and nobody waits for ever."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import pytest
from watching import until

from hvdtrain.errors import RankFailure


def test_the_first_failure_counts_and_all_hear_of_it(ranks):
    zero, one, two = ranks
    assert one.words.report("ValueError: first", "its traceback") is not None
    until(lambda: zero.failure and two.failure)
    second = two.words.report("ValueError: second", "another")
    assert second is not None
    assert (second.rank, second.message, second.traceback) == (1, "ValueError: first", "its traceback")
    with pytest.raises(RankFailure, match=r"rank 1 on .* failed first: ValueError: first") as caught:
        zero.raise_if_failed()
    assert caught.value.rank_traceback == "its traceback"
    one.raise_if_failed()  # its own failure is not another's


def test_listeners_are_told_and_a_rank_that_does_not_unwind_is_ended(ranks):
    zero, one, _ = ranks
    told: list[str] = []
    zero.on_failure.append(told.append)
    one.words.report("ValueError: first", "")
    until(lambda: told)
    assert "rank 1" in told[0]
    until(lambda: 0 in ranks.ended)
    assert ranks.ended[0] == 1
    assert 1 not in ranks.ended


def test_ranks_that_have_not_begun_an_operation_are_missing(ranks):
    zero, one, two = ranks
    with one.region("world", "all_reduce of 4 bytes", range(3)):
        pass
    with zero.region("world", "all_reduce of 4 bytes", range(3)):
        time.sleep(0.3)
        said = zero.missing("world", range(3))
    assert "rank 2" in said
    assert "rank 1" not in said
    del two


def test_a_rank_that_falls_silent_inside_an_operation_is_missing_and_its_hosts_clock_does_not_matter(
    ranks, monkeypatch
):
    zero, one, two = ranks
    with (
        two.region("world", "all_reduce of 4 bytes", range(3)),
        one.region("world", "all_reduce of 4 bytes", range(3)),
        zero.region("world", "all_reduce of 4 bytes", range(3)),
    ):
        time.sleep(0.2)
        assert zero.missing("world", range(3)) == ""
        two.close()  # it says no more, as one that was stopped or cut off
        monkeypatch.setattr(time, "time", lambda: 0.0)
        until(lambda: zero.missing("world", range(3)))
        said = zero.missing("world", range(3))
    assert "rank 2" in said
    assert "in all_reduce of 4 bytes; last heard of 0 s ago" in said
    assert "rank 1" not in said


def test_a_rank_that_left_is_named_to_those_that_wait_for_it(ranks, monkeypatch):
    monkeypatch.setattr("hvdtrain.ranks.watch._STUCK_S", 0.2)
    zero, one, two = ranks

    def leave() -> None:
        with pytest.raises(RankFailure):
            two.leave(20)

    leaving = threading.Thread(target=leave, daemon=True)
    leaving.start()
    with zero.region("world", "all_reduce of 4 bytes", range(3)):
        until(lambda: one.failure is not None)
    assert one.failure is not None
    assert "rank 2" in one.failure.message
    assert "has left the program" in one.failure.message
    leaving.join(20)


def test_a_rank_that_its_engine_holds_for_too_long_ends_and_names_who_is_silent(ranks):
    zero, one, two = ranks
    two.close()  # it says no more, as one that was stopped
    with zero.blind("the gradients of a.weight", 60.0):
        pass
    with one.blind("the gradients of b.weight", 60.0), zero.blind("the gradients of b.weight", 0.5):
        until(lambda: 0 in ranks.ended)
    said = one.failure.message if one.failure else ""
    assert "rank 0 waited 0.5 s inside the engine, which did not let it begin the gradients of b.weight" in said
    assert re.search(r"missing: rank 2 on \S+ \(computing; last heard of", said)
    assert "rank 1" not in said


def test_all_leave_together(ranks):
    threads = [threading.Thread(target=watch.leave, args=(20,)) for watch in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert ranks.ended == {}


def test_a_rank_that_does_not_come_at_the_end_is_named_after_the_time_out(ranks):
    zero, one, _ = ranks
    raised: list[str] = []

    def leave() -> None:
        with pytest.raises(RankFailure) as caught:
            one.leave(1.0)
        raised.append(str(caught.value))

    thread = threading.Thread(target=leave)
    thread.start()
    with pytest.raises(RankFailure, match=r"waited 1 s at the end of the program for ranks \[2\]"):
        zero.leave(1.0)
    thread.join(20)
    assert "[2]" in raised[0]


def test_a_lost_store_ends_the_rank(ranks):
    os.kill(ranks.process.pid, signal.SIGKILL)
    until(lambda: {0, 1, 2} <= set(ranks.ended), 30)


def test_a_rank_that_dies_is_named_with_what_it_was_at_by_one_of_the_others(ranks, capfd, monkeypatch):
    monkeypatch.setattr("hvdtrain.ranks.watch._DEATH_S", 0.1)
    zero, one, two = ranks
    one.step = 120
    until(lambda: '"step": 120' in zero._store.get("rank/1").decode())
    one.close()
    ranks.stores[1].close(farewell=False)
    until(lambda: {0, 2} <= set(ranks.ended))
    said = capfd.readouterr().err
    assert len(re.findall(r"^hvdtrain: rank 1 on \S+ died during step 120$", said, re.M)) == 1, said
    assert zero.failure == two.failure
    assert zero.failure.died


def test_a_rank_that_left_in_order_is_not_dead(ranks, monkeypatch):
    monkeypatch.setattr("hvdtrain.ranks.watch._DEATH_S", 0.1)
    zero, one, _ = ranks
    one._store.set("left/1", "1")
    one.close()
    ranks.stores[1].close(farewell=False)
    time.sleep(0.6)
    assert zero.failure is None


def test_a_store_that_is_stopped_holds_up_no_rank_that_has_waited_long_enough(ranks, monkeypatch):
    monkeypatch.setattr("hvdtrain.ranks.watch._ANSWER_S", 0.3)
    monkeypatch.setattr("hvdtrain.ranks.last_words._ANSWER_S", 0.3)
    zero, *_ = ranks
    os.kill(ranks.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with zero.region("world", "all_reduce of 4 bytes", range(3)):
            said = zero.missing("world", range(3))
        assert "rank 0's host does not tell which ranks are missing: no answer from the ranks' store" in said
        assert zero.words.report("ValueError: planted", "") is None
        assert time.monotonic() - began < 3
    finally:
        os.kill(ranks.process.pid, signal.SIGCONT)
    assert zero.missing("world", range(3)).count("rank ") == 2  # and it answers what is asked then


def test_threads_of_a_rank_wait_beside_each_other(ranks):
    """One thread's wait ends while another's goes on: what is still waited for is what the others read."""
    zero, one, _ = ranks
    inner, outer_done = threading.Event(), threading.Event()

    def first():
        with zero.region("world", "the first thread's wait", (1,)):
            inner.wait(10)
        outer_done.set()

    thread = threading.Thread(target=first)
    thread.start()
    until(lambda: zero._waiting)
    with zero.region("other", "the main thread's wait", (1,)):
        inner.set()
        assert outer_done.wait(10)
        with one.region("other", "x", (0,)), one.region("other", "x", (0,)):
            until(lambda: "the main thread's wait" in one.missing("other", (0,)))
    thread.join()
    assert zero._waiting == []


def test_no_count_is_lost_between_threads(ranks):
    zero, *_ = ranks

    def many():
        for _ in range(2000):
            with zero.region("world", "x", (1,)):
                pass

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert zero._counts == {"world": 8000}
