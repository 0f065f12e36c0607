"""What the tests of the training room share: one running process, and a logger that remembers."""

from __future__ import annotations

import pytest

from hvdtrain.backends.local import LocalBackend
from hvdtrain.launch.detect import Detection
from hvdtrain.topology import Topology


@pytest.fixture
def alone():
    with LocalBackend(Detection(topology=Topology.single(), reason="test", job_id="test"), device="cpu") as backend:
        yield backend


class Records:
    """A logger that keeps what it is told."""

    def __init__(self):
        self.steps, self.evaluations = [], []

    def log_step(self, record):
        self.steps.append(record)

    def log_eval(self, record):
        self.evaluations.append(record)

    def close(self):
        pass


@pytest.fixture
def records():
    return Records
