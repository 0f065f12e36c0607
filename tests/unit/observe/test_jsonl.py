from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from disk import full_disk

from hvdtrain.errors import OutputError
from hvdtrain.observe.jsonl import JsonlLogger
from hvdtrain.observe.logger import EvalRecord, FanOut, StepRecord


def record(step, loss=1.0):
    return StepRecord(step=step, total_steps=10, epoch=0, loss=loss, lr=0.1, samples_per_second=5.0)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_record_is_one_line_and_nan_is_null(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log_step(record(1, math.nan))
    logger.log_eval(EvalRecord(step=1, epoch=1, metrics={"loss": 2.0}))
    logger.close()
    first, second = lines(tmp_path / "metrics.jsonl")
    assert (first["kind"], first["step"], first["loss"]) == ("step", 1, None)
    assert (second["kind"], second["eval_loss"]) == ("eval", 2.0)


def test_a_resumed_run_has_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    for step in (1, 2, 3):
        logger.log_step(record(step))
    logger.close()
    with path.open("a") as file:
        file.write('{"step": 4, "cut o')
    logger = JsonlLogger(path, resumed_step=2)
    logger.log_step(record(3, 9.0))
    logger.close()
    assert [(entry["step"], entry["loss"]) for entry in lines(path)] == [(1, 1.0), (2, 1.0), (3, 9.0)]


def test_a_file_stays_as_it_is_until_there_is_a_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for resumed_step in (0, 2):
        path.write_text('{"step": 2}\n{"step": 3}\n')
        before = path.stat()
        logger = JsonlLogger(path, resumed_step)
        logger.close()
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        logger = JsonlLogger(path, resumed_step)
        logger.log_step(record(5))
        logger.close()
        assert [entry["step"] for entry in lines(path)] == ([2, 5] if resumed_step else [5])


def test_a_logger_that_fails_is_dropped_and_the_others_go_on(tmp_path, caplog):
    (tmp_path / "file").touch()
    broken, whole = JsonlLogger(tmp_path / "file" / "a.jsonl"), JsonlLogger(tmp_path / "b.jsonl")
    both = FanOut([broken, whole])
    both.log_step(record(1))
    both.log_step(record(2))
    both.close()
    assert len(lines(tmp_path / "b.jsonl")) == 2
    assert caplog.text.count("failed") == 1


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_that_is_deleted_is_made_anew_with_all_of_its_records(tmp_path, caplog, what):
    path = tmp_path / "run" / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log_step(record(1))
    shutil.rmtree(path.parent) if what == "folder" else path.unlink()
    logger.log_step(record(2))
    logger.log_step(record(3))
    shutil.rmtree(path.parent) if what == "folder" else path.unlink()
    logger.close()  # after the last record, too
    assert [entry["step"] for entry in lines(path)] == [1, 2, 3]
    assert caplog.text.count("was deleted while this run wrote it; it is there again") == 2


def test_a_file_that_somebody_else_put_there_is_left_alone_and_that_is_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log_step(record(1))
    path.unlink()
    path.write_text("not ours")
    logger.log_step(record(2))
    assert "somebody has put another file there" in caplog.text
    with pytest.raises(OutputError, match="1 records could not be written"):
        logger.close()
    assert path.read_text() == "not ours"


def test_records_wait_while_a_disk_is_full_and_none_is_cut(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log_step(record(1))
    with full_disk(path.stat().st_size + 20):
        logger.log_step(record(2))
        logger.log_step(record(3))
        assert [entry["step"] for entry in lines(path)] == [1]
    logger.log_step(record(4))
    logger.close()
    assert [entry["step"] for entry in lines(path)] == [1, 2, 3, 4]
    assert caplog.text.count("its records wait") == 1


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir], ids=["fifo", "device", "folder"]
)
def test_what_is_no_plain_file_is_neither_read_nor_waited_for_and_that_is_said(tmp_path, caplog, make):
    path = tmp_path / "metrics.jsonl"
    make(path)
    logger = JsonlLogger(path, resumed_step=1)
    logger.log_step(record(2))
    assert "no plain file" in caplog.text
    with pytest.raises(OutputError, match="1 records could not be written"):
        logger.close()


def test_of_a_damaged_file_the_whole_records_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\x00\x80\n{"step": 2}\n')
    logger = JsonlLogger(path, resumed_step=2)
    logger.log_step(record(3))
    logger.close()
    assert [entry["step"] for entry in lines(path)] == [1, 2, 3]
