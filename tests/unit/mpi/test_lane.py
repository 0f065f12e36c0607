"""The thread that performs a group's operations: order, errors, time-outs, the end; no MPI is needed for that."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from hvdtrain.mpi.lane import Lane, MpiWork, forget


@pytest.fixture
def lane():
    made = Lane("a lane", lambda work: "; missing: rank 1")
    yield made
    made.close(5)
    forget(made)


def work(what: str = "all_reduce", timeout_s: float = 30.0, tensors=()) -> MpiWork:
    return MpiWork(what, list(tensors), timeout_s)


def test_operations_run_in_order_in_one_thread_beside_the_caller(lane):
    done: list[int] = []
    threads: set[int] = set()

    def operation(number: int):
        def run() -> None:
            threads.add(threading.get_ident())
            time.sleep(0.001)
            done.append(number)

        return run

    works = [lane.submit(work(), operation(number)) for number in range(50)]
    for one in reversed(works):
        one.wait()
    assert done == list(range(50))
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert all(one.is_success() for one in works)


def test_an_error_reaches_whoever_waits_and_the_lane_goes_on(lane):
    def fail() -> None:
        raise ValueError("planted")

    failed = lane.submit(work("reduce"), fail)
    good = lane.submit(work(), lambda: None)
    with pytest.raises(dist.DistBackendError, match="reduce failed: ValueError: planted"):
        failed.wait()
    assert isinstance(failed.exception(), dist.DistBackendError)
    assert not failed.is_success()
    good.wait()


def test_an_operation_that_lasts_too_long_is_named_and_ends_the_lane(lane):
    release = threading.Event()
    stuck = lane.submit(work("broadcast of 4 bytes", 0.3), lambda: release.wait(20))
    queued = lane.submit(work("the next"), lambda: None)
    began = time.monotonic()
    with pytest.raises(dist.DistBackendError, match=r"broadcast of 4 bytes timed out after 0\.3 s; missing: rank 1"):
        stuck.wait()
    assert time.monotonic() - began < 5
    with pytest.raises(dist.DistBackendError, match="the next: given up, because of broadcast"):
        queued.wait()
    assert lane.stuck
    with pytest.raises(dist.DistBackendError, match="unusable since an earlier failure"):
        lane.submit(work(), lambda: None)
    release.set()


def test_a_short_wait_of_the_callers_leaves_the_operation_alone(lane):
    release = threading.Event()
    slow = lane.submit(work(), lambda: release.wait(20))
    with pytest.raises(dist.DistBackendError, match=r"waited 0\.1 s, timed out; the operation goes on"):
        slow.wait(timedelta(seconds=0.1))
    release.set()
    assert slow.wait(timedelta(seconds=10))


def test_what_is_known_from_elsewhere_ends_the_wait(lane):
    release = threading.Event()
    stuck = lane.submit(work("gather"), lambda: release.wait(20))
    time.sleep(0.1)
    lane.give_up("rank 2 failed first")
    with pytest.raises(dist.DistBackendError, match="gather: rank 2 failed first"):
        stuck.wait()
    release.set()


def test_futures_give_the_tensors_and_chained_work_may_use_the_lane(lane):
    tensor = torch.ones(2)
    first = lane.submit(work(tensors=[tensor]), lambda: time.sleep(0.05))

    def further(done):
        lane.submit(work(), lambda: None).wait()  # would never end if it ran in the lane itself
        return done.value()[0] + 1

    assert first.get_future().then(further).wait().tolist() == [2.0, 2.0]


def test_a_failed_operations_future_fails(lane):
    def fail() -> None:
        raise ValueError("planted")

    future = lane.submit(work(), fail).get_future()
    with pytest.raises(Exception, match="planted"):
        future.wait()


def test_a_closed_lane_finishes_its_queue_and_takes_no_more(lane):
    done: list[int] = []
    for number in range(5):
        lane.submit(work(), lambda number=number: done.append(number))
    assert lane.close(5)
    assert done == list(range(5))
    with pytest.raises(dist.DistBackendError, match="was destroyed"):
        lane.submit(work(), lambda: None)


def test_results_do_not_outlive_their_users(lane):
    import gc
    import weakref

    tensor = torch.ones(3)
    seen = weakref.ref(tensor)
    one = lane.submit(work(tensors=[tensor]), lambda: None)
    one.wait()
    del tensor, one
    time.sleep(0.05)
    gc.collect()
    assert seen() is None


def test_an_idle_lane_can_be_taken_and_what_is_left_goes_before_what_was_queued_since(lane):
    done: list[str] = []
    assert lane.enter()
    assert not lane.enter()
    queued = lane.submit(work("queued"), lambda: done.append("queued"))
    time.sleep(0.05)
    assert done == []
    own = work("own")
    lane.hand_over(own, lambda: done.append("rest"))
    own.wait()
    queued.wait()
    assert done == ["rest", "queued"]
    lane.submit(work(), lambda: None).wait()
    end = time.monotonic() + 10
    while not lane.enter():  # the thread says that it is idle after it has said that the work is over
        assert time.monotonic() < end
    lane.leave()


def test_a_busy_lane_cannot_be_taken(lane):
    release = threading.Event()
    slow = lane.submit(work(), lambda: release.wait(20))
    assert not lane.enter()
    release.set()
    slow.wait()


def test_what_is_performed_in_the_callers_thread_fails_as_elsewhere_and_can_be_interrupted(lane):
    def fail() -> None:
        raise ValueError("planted")

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert lane.enter()
    failed = work("reduce")
    lane.perform(failed, fail)
    lane.leave()
    with pytest.raises(dist.DistBackendError, match="reduce failed: ValueError: planted"):
        failed.wait()
    assert lane.enter()
    with pytest.raises(KeyboardInterrupt):
        lane.perform(work("gather"), interrupt)
    lane.leave()
    with pytest.raises(dist.DistBackendError, match=r"earlier failure: gather was interrupted \(KeyboardInterrupt\)"):
        lane.submit(work(), lambda: None)


def test_a_callers_thread_that_is_stuck_ends_the_process():
    reasons: list[str] = []
    ended = threading.Event()

    def end(reason: str) -> None:
        reasons.append(reason)
        ended.set()

    lane = Lane("a lane", lambda work: "; missing: rank 1", end)
    assert lane.enter()
    lane.perform(work("broadcast", 0.3), lambda: ended.wait(20))
    lane.leave()
    assert reasons == ["broadcast timed out after 0.3 s; missing: rank 1"]
    lane.close(5)
    forget(lane)


def test_what_was_handed_over_fails_when_the_group_gives_up(lane):
    release = threading.Event()
    lane.submit(work("first"), lambda: None).wait()
    end = time.monotonic() + 10
    while not lane.enter():
        assert time.monotonic() < end
    own = work("own")
    lane.hand_over(own, lambda: release.wait(20))
    time.sleep(0.05)
    lane.give_up("rank 2 failed first")
    with pytest.raises(dist.DistBackendError, match="own: rank 2 failed first"):
        own.wait()
    release.set()


def test_a_lane_that_is_closed_before_an_operation_times_out_ends_when_that_returns(lane):
    release = threading.Event()
    stuck = lane.submit(work("broadcast", 0.3), lambda: release.wait(20))
    assert not lane.close(0.01)
    with pytest.raises(dist.DistBackendError, match="timed out"):
        stuck.wait()
    release.set()
    assert lane.close(5)
    assert not lane.stuck


def test_closing_waits_for_what_a_caller_does_in_its_own_thread_and_hands_over(lane):
    inside, done = threading.Event(), []

    def caller() -> None:
        assert lane.enter()
        inside.set()
        time.sleep(0.2)
        own = work("own")
        lane.hand_over(own, lambda: (time.sleep(0.2), done.append("rest")))
        own.wait()

    thread = threading.Thread(target=caller)
    thread.start()
    inside.wait()
    assert lane.close(5)
    assert done == ["rest"]
    thread.join()
    assert not lane.enter()
