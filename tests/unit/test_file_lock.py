"""Locks of files between real processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvdtrain.file_lock import LockTimeout, lock

HOLDER = "import os, sys, time; from hvdtrain.file_lock import lock; lock(os.open(sys.argv[1], os.O_RDWR), timeout_s=9)\nprint('held', flush=True); time.sleep(60)"


@pytest.fixture
def held(tmp_path):
    """A file that another process has locked, and that process."""
    file = tmp_path / "lock"
    file.touch()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    yield file, holder
    holder.kill()
    holder.communicate()


def opened(file: Path) -> int:
    return os.open(file, os.O_RDWR)


def test_a_lock_that_another_process_holds_is_waited_for_with_a_bound_and_said_once(held):
    file, _ = held
    said = []
    began = time.monotonic()
    descriptor = opened(file)
    with pytest.raises(LockTimeout, match=r"for 0\.3 s"):
        lock(descriptor, timeout_s=0.3, waiting=lambda: said.append(1))
    assert 0.3 <= time.monotonic() - began < 5
    assert said == [1]
    os.close(descriptor)


def test_a_killed_process_leaves_no_lock(held):
    file, holder = held
    descriptor = opened(file)
    lock(descriptor, timeout_s=30, waiting=holder.kill)
    os.close(descriptor)


def test_a_free_lock_is_taken_at_once_and_ends_with_its_descriptor(tmp_path):
    for _ in range(2):
        descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
        lock(descriptor, timeout_s=0, waiting=lambda: pytest.fail("it waited"))
        os.close(descriptor)


def test_a_descriptor_that_cannot_be_locked_is_an_error_at_once(tmp_path):
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    os.close(descriptor)
    with pytest.raises(OSError, match=rf"\[Errno {errno.EBADF}\]"):
        lock(descriptor, timeout_s=30)
