"""Tests whose one body runs whole on every rank, over the mpi4py process group; `tests/system/test_mpi_group.py` starts them."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import hvdtrain.mpi  # noqa: F401  (registers the group)


def pytest_configure(config):
    # torch 2.13 renames some operations; the old names must go on working.
    config.addinivalue_line("filterwarnings", "ignore:.*is deprecated. Please use:FutureWarning")


@pytest.fixture(scope="session", autouse=True)
def world(request):
    torch.set_num_threads(1)
    dist.init_process_group("mpi4py", timeout=timedelta(seconds=60))
    yield dist.group.WORLD
    if request.session.testsfailed:  # the others may wait in a test that this rank has left
        raise RuntimeError(f"a test failed on rank {dist.get_rank()}")
    dist.destroy_process_group()


@pytest.fixture
def rank():
    return dist.get_rank()


@pytest.fixture
def size():
    return dist.get_world_size()


@pytest.fixture(autouse=True)
def _lock_step(world):
    torch.manual_seed(dist.get_rank())
    dist.barrier()
