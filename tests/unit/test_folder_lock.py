"""One job writes in a folder: named, kept by a stopped one, freed by the death of its process and by nothing else."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from hvdtrain.folder_lock import FolderInUse, take

HOLDER = """
import os, sys, time
from pathlib import Path
from hvdtrain.folder_lock import take
lock = take(Path(sys.argv[1]))
if sys.argv[2] == "forked" and os.fork() == 0:  # a loader's worker, which outlives its parent
    print(os.getpid(), flush=True)
    time.sleep(60)
if sys.argv[2] == "read":  # somebody copies the folder
    open(sys.argv[1]).close()
if sys.argv[2] != "forked":
    print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run" / ".lock"


@pytest.fixture
def start(file):
    """Start another process that holds the lock."""
    started = []

    def start(how=""):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(file), how], stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", ["", "read", "stopped"])
def test_another_job_is_refused_by_the_holders_name(file, start, how):
    holder, _ = start(how)
    if how == "stopped":
        holder.send_signal(signal.SIGSTOP)
    with pytest.raises(FolderInUse, match=rf"^process {holder.pid} on {socket.gethostname()}, since 20..-..-..T"):
        take(file)
    holder.kill()
    holder.wait()
    lock = take(file)
    assert lock.holds
    assert json.loads(file.read_text())["pid"] == os.getpid()
    lock.release()
    assert file.read_text() == ""


def test_a_forked_worker_that_outlives_its_parent_does_not_keep_it(file, start):
    holder, worker = start("forked")
    with pytest.raises(FolderInUse):
        take(file)
    holder.kill()
    holder.wait()
    try:
        os.kill(int(worker), 0)  # it is still there
        take(file).release()
    finally:
        os.kill(int(worker), signal.SIGKILL)


def test_a_job_that_is_just_ending_is_waited_for(file, start):
    holder, _ = start()
    holder.kill()
    take(file, wait_s=10).release()
    began = time.monotonic()
    start()
    with pytest.raises(FolderInUse):
        take(file, wait_s=0.3)
    assert time.monotonic() - began > 0.3


def test_one_process_has_it_once_and_a_forked_one_has_it_not(file):
    lock = take(file)
    assert take(file) is lock
    child = os.fork()
    if child == 0:
        os._exit(int(lock.holds))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert lock.holds
    lock.release()


def test_a_lock_whose_file_was_deleted_holds_no_longer(file):
    lock = take(file)
    file.unlink()
    assert not lock.holds
    again = take(file)
    assert again.holds
    again.release()
    file.parent.joinpath("x").touch()
    lock.release()


def test_garbage_is_released(file, start):
    lock = take(file)
    assert lock.holds
    del lock
    assert start()[1] == "held"


def test_a_file_system_without_locks_is_said_and_goes_on(file, monkeypatch, caplog):
    import errno
    import fcntl

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert take(file).holds
    assert "cannot be locked (No locks available): nothing keeps a second job out" in caplog.text
