"""Tests of Horovod's API whose one body runs whole on every rank; `tests/system/test_horovod_api.py` starts them."""

from __future__ import annotations

import pytest
import torch

import hvdtrain.horovod as hvd


@pytest.fixture(scope="session", autouse=True)
def job(request):
    torch.set_num_threads(1)
    hvd.init()
    yield
    if request.session.testsfailed:  # the others may wait in a test that this rank has left
        raise RuntimeError(f"a test failed on rank {hvd.rank()}")
    hvd.shutdown()


@pytest.fixture
def rank():
    return hvd.rank()


@pytest.fixture
def size():
    return hvd.size()


@pytest.fixture(autouse=True)
def _lock_step(job):
    torch.manual_seed(0)
    hvd.barrier()
