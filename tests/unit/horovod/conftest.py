"""Horovod's API in this process, a world of one."""

import pytest

import hvdtrain.horovod as hvd


@pytest.fixture
def one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "HVDTRAIN_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    hvd.init()
    yield hvd
    hvd.shutdown()
