"""pytest fixtures for tests whose one body runs whole on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import hvdtrain
from hvdtrain.backends.base import Backend
from hvdtrain.backends.local import LocalBackend
from hvdtrain.launch.detect import Detection
from hvdtrain.topology import Topology

_TIMEOUT_S = 60.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say which backend is tested."""
    parser.addoption("--hvdtrain-backend", default="auto")
    parser.addoption("--hvdtrain-device", default="cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stop the backend last: some engines start only once in a process."""
    items.sort(key=lambda item: item.path.name == "test_stop.py")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The running backend."""
    config = request.config
    made = hvdtrain.init(
        config.getoption("--hvdtrain-backend"), device=config.getoption("--hvdtrain-device"), timeout_s=_TIMEOUT_S
    )
    with made as running:
        yield running
        if request.session.testsfailed:  # the others may wait in a test that this rank has left
            raise RuntimeError(f"a test failed on rank {running.rank}")


@pytest.fixture
def reference(backend: Backend) -> Iterator[Backend]:
    """One process on its own, to compare with."""
    alone = Detection(topology=Topology.single(), reason="reference", job_id="reference")
    with LocalBackend(alone, device=str(backend.device)) as running:
        yield running


@pytest.fixture(autouse=True)
def _lock_step(backend: Backend) -> None:
    """Begin every test on all ranks together, with the same random numbers."""
    # Not torch.manual_seed: where no GPU is in use, that notes a stack trace for each kind of GPU, 1 ms a time.
    torch.default_generator.manual_seed(0)
    if backend.device.type == "cuda":
        torch.cuda.manual_seed_all(0)
    backend.barrier()
