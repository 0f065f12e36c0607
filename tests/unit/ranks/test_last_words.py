"""Who failed first and who may speak, several ranks in one process over a real store."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
import torch

from hvdtrain.errors import CollectiveError, ConfigError, HvdtrainError, RankFailure
from hvdtrain.ranks import last_words
from hvdtrain.ranks.last_words import conclude, end_as_victim, is_engine_error, leave_for_launcher
from hvdtrain.ranks.watch import NullWatch


def concluded(ranks, errors):
    """What `conclude` says on each rank that has an error; ranks conclude at once, in threads."""
    said: dict[int, object] = {}
    threads = [
        threading.Thread(target=lambda r=rank, e=error: said.__setitem__(r, conclude(e, ranks.watches[r])))
        for rank, error in errors.items()
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.2)  # the first of them is the first
    for thread in threads:
        thread.join(30)
    return said


def test_the_first_speaks_and_the_others_are_its_victims(ranks, monkeypatch):
    monkeypatch.setattr(last_words, "_SPEAK_S", 0.2)
    said = concluded(
        ranks, {1: ValueError("planted"), 0: KeyError("later"), 2: RuntimeError("Gloo: connection closed")}
    )
    assert said[1] is None
    for victim in (0, 2):
        assert isinstance(said[victim], RankFailure)
        assert said[victim].rank == 1
        assert "ValueError: planted" in said[victim].rank_traceback
    assert not any(watch._thread.is_alive() for watch in ranks)
    time.sleep(0.3)
    assert ranks.ended == {}  # nobody was ended by its watch


def test_an_engine_error_waits_for_the_one_whose_fault_it_was(ranks, monkeypatch):
    monkeypatch.setattr(last_words, "_SPEAK_S", 0.2)
    said = concluded(ranks, {0: RuntimeError("Gloo: connection closed"), 1: ValueError("planted, but later")})
    assert said[1] is None
    assert said[0].rank == 1


def test_a_failed_rank_stays_until_its_words_were_read_and_no_longer(ranks, monkeypatch):
    began = time.monotonic()
    assert conclude(ValueError("planted"), ranks.watches[1]) is None
    assert time.monotonic() - began < last_words.ACK_S / 2  # the watches of 0 and 2 acknowledge in their threads
    monkeypatch.setattr(last_words, "ACK_S", 0.5)
    ranks.stores[0].delete_key("ack/2")
    began = time.monotonic()
    assert conclude(ValueError("planted"), ranks.watches[1]) is None
    assert 0.5 <= time.monotonic() - began < 2


def test_a_victim_stays_until_the_first_has_spoken(ranks):
    ranks.watches[1].words.report("ValueError: planted", "")
    threading.Timer(0.7, ranks.watches[1].words._have_spoken).start()
    began = time.monotonic()
    failure = conclude(KeyError("later"), ranks.watches[0])
    assert failure is not None
    assert 0.6 < time.monotonic() - began < 3


def test_victims_wait_for_the_first_to_have_spoken_but_not_for_ever(ranks, monkeypatch):
    zero, one, two = (watch.words for watch in ranks)
    one._have_spoken()
    began = time.monotonic()
    zero.let_speak()
    assert time.monotonic() - began < 1
    one._store.delete_key("spoken")
    monkeypatch.setattr(last_words, "_SPEAK_S", 0.3)
    two.let_speak()
    assert 0.3 <= time.monotonic() - began < 3


def test_with_the_store_gone_a_rank_speaks_for_itself(ranks):
    for watch in ranks:
        watch.close()
    watch = ranks.watches[1]
    os.kill(ranks.process.pid, signal.SIGKILL)
    began = time.monotonic()
    failure = RankFailure("lost")
    assert conclude(ValueError("mine"), watch) is None
    assert conclude(failure, watch) is failure
    assert conclude(ConnectionError("connection reset"), watch) is None
    assert time.monotonic() - began < 10


def test_a_world_of_one_has_nobody_to_blame_or_to_wait_for():
    began = time.monotonic()
    assert conclude(ValueError("mine"), NullWatch()) is None
    assert conclude(RuntimeError("NCCL error"), NullWatch()) is None
    assert time.monotonic() - began < 0.5


def test_a_victim_ends_without_a_traceback_unless_nobody_else_can_tell(monkeypatch):
    monkeypatch.setattr(last_words, "_COURTESY_S", 0.1)
    with pytest.raises(SystemExit) as ended:
        end_as_victim(RankFailure("rank 1 failed first", rank=1))
    assert ended.value.code == HvdtrainError.exit_code
    assert ended.value.__suppress_context__
    with pytest.raises(RankFailure, match="waited"):
        end_as_victim(RankFailure("waited 5 s"))


@pytest.mark.parametrize(
    ("error", "engines"),
    [
        (torch.distributed.DistBackendError("anything"), True),
        (ConnectionResetError("peer"), True),
        (RuntimeError("[gloo] Connection closed by peer"), True),
        (RuntimeError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("NCCL"), False),
        (CollectiveError("src=7 is no rank"), False),
        (ConfigError("socket"), False),
    ],
    ids=str,
)
def test_engine_errors_are_told_from_the_users(error, engines):
    assert is_engine_error(error) is engines


def test_a_collective_that_the_engine_failed_is_the_engines():
    error = CollectiveError("all_reduce failed")
    error.__cause__ = RuntimeError("whatever")
    assert is_engine_error(error)


def test_the_traceback_lies_where_the_launcher_looks_for_it(tmp_path):
    file = tmp_path / "error.json"
    try:
        raise ValueError("planted")
    except ValueError as error:
        leave_for_launcher(error, str(file))
        leave_for_launcher(error, None)
        leave_for_launcher(error, str(tmp_path / "missing" / "error.json"))  # no reason to fail in another way
    said = json.loads(file.read_text())["message"]
    assert said["message"] == "ValueError: planted"
    assert "test_last_words.py" in said["extraInfo"]["py_callstack"]
