"""Groups of ranks are given back: by closing, at the end of a `with` block, or as garbage."""

import gc
import os
import threading
import time

import pytest
import torch

from hvdtrain.errors import CollectiveError

pytestmark = pytest.mark.feature("collectives")


def ones(group):
    return None if group is None else int(group.all_reduce(torch.tensor(1)))


def test_a_closed_group_is_refused_and_the_world_goes_on(backend):
    everyone = list(range(backend.world_size))
    group = backend.group(everyone)
    assert ones(group) == backend.world_size
    group.close()
    group.close()
    with pytest.raises(CollectiveError, match="was closed; make it anew"):
        group.barrier()
    with backend.group(everyone) as another:
        assert ones(another) == backend.world_size
    with pytest.raises(CollectiveError, match="was closed"):
        another.all_reduce(torch.ones(2))
    assert ones(backend) == backend.world_size


def test_a_rank_closes_without_waiting_for_the_others(backend):
    everyone = list(range(backend.world_size))
    for turn in range(20):
        with backend.group(everyone) as group:
            if backend.rank == turn % backend.world_size:
                time.sleep(0.005)
            assert [int(t) for t in group.all_gather(torch.tensor(group.rank))] == everyone


@pytest.mark.costly(0.5)
@pytest.mark.parametrize("how", ["with", "garbage", "list"])
def test_groups_leave_no_threads_and_no_descriptors(backend, how):
    everyone = list(range(backend.world_size))

    def make():
        group = backend.group(everyone)
        assert ones(group) == backend.world_size
        return group

    def held():
        gc.collect()
        backend.barrier()
        return threading.active_count(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    make().close()
    before = held()
    if how == "with":
        for _ in range(10):
            with make():
                pass
    elif how == "garbage":
        for _ in range(10):
            make()
    else:
        kept = [make() for _ in range(10)]
        del kept
    for _ in range(200):  # as many rounds on every rank; garbage is freed by a thread
        after = held()
        if not any(backend.all_gather_object(any(now > then for now, then in zip(after, before, strict=True)))):
            break
        time.sleep(0.05)
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
