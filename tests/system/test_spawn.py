"""hvdtrain.spawn: results in rank order, or the failing rank's traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from launching import missing

import hvdtrain
from hvdtrain import workers
from hvdtrain.errors import ConfigError, RankFailure

ENGINES = ["torch", "horovod"]


@pytest.fixture(params=ENGINES)
def engine(request):
    reason = missing("python", request.param)
    if reason:
        pytest.skip(reason)
    return request.param


def test_results_come_back_in_rank_order(engine):
    def work(backend, base):
        return (backend.rank, backend.name, backend.all_gather_object(base + backend.rank))

    found = hvdtrain.spawn(work, 3, engine, (10,), device="cpu")
    assert found == [(rank, engine, [10, 11, 12]) for rank in range(3)]


def test_the_failing_ranks_traceback_is_in_the_error(engine):
    def work(backend):
        if backend.rank == 1:
            raise KeyError("planted here")
        backend.barrier()

    with pytest.raises(RankFailure, match=r"rank 1 of 2 failed(.|\n)*KeyError: 'planted here'") as caught:
        hvdtrain.spawn(work, 2, engine, device="cpu")
    assert caught.value.rank == 1


def test_a_killed_rank_is_named_by_its_signal():
    def work(backend):
        if backend.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        backend.barrier()

    with pytest.raises(RankFailure):
        hvdtrain.spawn(work, 2, "torch", device="cpu", limit_s=60)


@pytest.mark.parametrize(
    ("culprit", "code"), [(0, 3), *(pytest.param(*one, marks=pytest.mark.slow) for one in [(1, 1), (0, 1), (1, 3)])]
)
def test_a_rank_that_leaves_is_named_also_when_all_are_seen_to_end_at_once(monkeypatch, culprit, code):
    def work(backend, culprit, code):
        if backend.rank == culprit:
            sys.exit(code)
        backend.barrier()

    monkeypatch.setattr("hvdtrain.workers._look_nowhere", lambda: time.sleep(8))  # as on a machine that is busy
    with pytest.raises(RankFailure, match=f"rank {culprit} of 2 ended with exit code {code} and left no traceback"):
        hvdtrain.spawn(work, 2, "torch", (culprit, code), device="cpu")


CALLER = "import hvdtrain, os; hvdtrain.spawn(lambda backend: os.kill(os.getppid(), 9), 1, 'local')"


@pytest.mark.slow
def test_the_folder_of_a_caller_that_was_killed_is_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with workers._exchange_folder() as held:
        ended = subprocess.run(
            [sys.executable, "-c", CALLER], env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=60, check=False
        )
        assert ended.returncode == -signal.SIGKILL
        assert len(list(tmp_path.glob("hvdtrain-spawn-*"))) == 2
        assert hvdtrain.spawn(lambda backend: backend.rank, 1, "local", device="cpu") == [0]
        assert list(tmp_path.glob("hvdtrain-spawn-*")) == [held]


def test_ranks_that_take_too_long_are_ended():
    def work(backend):
        time.sleep(300)

    began = time.monotonic()
    with pytest.raises(RankFailure, match="still running after 6 s"):
        hvdtrain.spawn(work, 2, "torch", device="cpu", limit_s=6)
    assert time.monotonic() - began < 30


def test_the_backends_own_timeout_is_passed_on():
    assert hvdtrain.spawn(lambda backend: backend.timeout_s, 1, "local", timeout_s=7) == [7.0]
    for limit_s in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="limit_s must be"):
            hvdtrain.spawn(print, 1, "local", limit_s=limit_s)


def test_an_unknown_backend_is_refused_before_ranks_start():
    with pytest.raises(ConfigError, match=r"gloo.*torch"):
        hvdtrain.spawn(print, 2, "gloo")


def test_an_impossible_number_of_ranks_is_refused():
    with pytest.raises(ConfigError, match="at least one rank"):
        hvdtrain.spawn(print, 0)
