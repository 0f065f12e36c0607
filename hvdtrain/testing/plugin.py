"""pytest fixtures for tests whose one body runs whole on every rank."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import hvdtrain
from hvdtrain.backends.base import Backend
from hvdtrain.backends.local import LocalBackend
from hvdtrain.launch.detect import Detection
from hvdtrain.testing.features import ENGINES, FEATURES, Record
from hvdtrain.topology import Topology

_TIMEOUT_S = 60.0
_RECORD = pytest.StashKey[Record]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say which backend is tested."""
    parser.addoption("--hvdtrain-backend", default="auto")
    parser.addoption("--hvdtrain-device", default="cpu")
    parser.addoption("--hvdtrain-record", type=Path)
    parser.addoption("--hvdtrain-sample", type=int, help="of each test with parameters run this many of them at most")
    parser.addoption("--hvdtrain-brief", action="store_true", help="of each costly test run some of its parameters")
    parser.addoption(
        "--hvdtrain-timing", action="store_true", help="tests that compare times as well: the machine must not be busy"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Know the marks of tests that stand for a feature."""
    config.addinivalue_line("markers", "timing: compares times (--hvdtrain-timing)")
    config.addinivalue_line(
        "markers",
        "costly(most): takes long; how many of its parameters a brief run takes; 0.5: one, on every second engine",
    )
    config.addinivalue_line(
        "markers",
        "feature(name, refused_by={}): one of `hvdtrain.testing.features`; engines where the test shows a refusal, with the reason",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Stop the backend last: some engines start only once in a process. Leave out what compares times, unless it is asked for."""
    if not config.getoption("--hvdtrain-timing"):
        items[:] = [item for item in items if item.get_closest_marker("timing") is None]
    engine = config.getoption("--hvdtrain-backend")
    turn = [*ENGINES, engine].index(engine)
    items[:] = sampled(items, config.getoption("--hvdtrain-sample"), config.getoption("--hvdtrain-brief"), turn)
    items.sort(key=lambda item: item.path.name == "test_stop.py")
    unknown = {mark.args[0] for item in items for mark in item.iter_markers("feature")} - set(FEATURES)
    if unknown:
        raise pytest.UsageError(f"no such feature in hvdtrain.testing.features: {', '.join(sorted(unknown))}")


def pytest_collection_finish() -> None:
    """Let no garbage collection walk through what is loaded: it would be a tenth of a rank's time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Triton takes what is frozen for leaked at the end."""
    gc.unfreeze()


def sampled(items: Sequence[pytest.Item], most: int | None, brief: bool, turn: int) -> list[pytest.Item]:
    """Some of the items of each test, the same on every rank, and others on another turn.

    Args:
        items: Tests with their parameters.
        most: How many of each test; ``None`` for all.
        brief: Whether those marked costly are as few as their mark says.
        turn: Where in a test's shuffled parameters to begin, in samples: engines that take turns leave little out.
    """
    of: dict[str, list[pytest.Item]] = {}
    for item in items:
        of.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept: set[pytest.Item] = set()
    for name, each in of.items():
        costly = each[0].get_closest_marker("costly") if brief else None
        part = costly.args[0] if costly else len(each)
        if part < 1:
            part = int((turn + len(name)) % round(1 / part) == 0)
        count = min(len(each), part, *([] if most is None else [most]))
        shuffled = random.Random(name).sample(each, len(each))
        kept |= {shuffled[(turn * count + at) % len(each)] for at in range(count)}
    return [item for item in items if item in kept]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Count the tests of each feature that pass."""
    yield
    record = item.config.stash.get(_RECORD, None)
    if record is not None:
        for mark in item.iter_markers("feature"):
            record.count(mark.args[0], mark.kwargs.get("refused_by", {}))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write down what passed, if all did."""
    file, record = session.config.getoption("--hvdtrain-record"), session.config.stash.get(_RECORD, None)
    if file is not None and record is not None and exitstatus == 0:
        record.write(file)


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The running backend."""
    config = request.config
    made = hvdtrain.init(
        config.getoption("--hvdtrain-backend"), device=config.getoption("--hvdtrain-device"), timeout_s=_TIMEOUT_S
    )
    with made as running:
        if running.rank == 0:
            config.stash[_RECORD] = Record(
                backend=running.name, world_size=running.world_size, device=running.device.type
            )
        yield running
        if request.session.testsfailed:  # the others may wait in a test that this rank has left
            raise RuntimeError(f"a test failed on rank {running.rank}")


@pytest.fixture
def reference(backend: Backend) -> Iterator[Backend]:
    """One process on its own, to compare with."""
    alone = Detection(topology=Topology.single(), reason="reference", job_id="reference")
    with LocalBackend(alone, device=str(backend.device)) as running:
        yield running


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The messages that hvdtrain has logged since the test began, from INFO on."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hvdtrain")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _lock_step(backend: Backend) -> None:
    """Begin every test on all ranks together, with the same random numbers."""
    # Not torch.manual_seed: where no GPU is in use, that notes a stack trace for each kind of GPU, 1 ms a time.
    torch.default_generator.manual_seed(0)
    if backend.device.type == "cuda":
        torch.cuda.manual_seed_all(0)
    backend.barrier()
