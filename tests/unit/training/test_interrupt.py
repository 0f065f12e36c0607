"""Ctrl-C once asks, twice ends at once: in real processes, whatever their main thread is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hvdtrain.training.interrupt import SAME_S, Interrupt

LOOP = """
import os, sys, time
from hvdtrain.training.interrupt import Interrupt
def say(text):  # whole, whoever else says something
    os.write(1, f"{text}\\n".encode())
with Interrupt(say) as interrupted:
    say("ready")
    while not interrupted():
        time.sleep(0.01)
    say("asked")
    time.sleep(float(sys.argv[1]))
say("done")
"""
STUCK = """
import ctypes
from hvdtrain.training.interrupt import Interrupt
mutex = ctypes.create_string_buffer(128)
lock = ctypes.CDLL(None).pthread_mutex_lock
with Interrupt(lambda text: print(text, flush=True)):
    print("ready", flush=True)
    lock(mutex)
    lock(mutex)  # held by itself: nothing interrupts that, and no handler in Python runs
"""
SAID = "interrupted: a checkpoint is being saved; once more ends at once\n"


@pytest.fixture
def started():
    processes = []

    def start(program, *argv):
        process = subprocess.Popen([sys.executable, "-c", program, *argv], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_the_first_one_is_noted_and_said_and_ends_nothing(started):
    process = started(LOOP, "0")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert sorted(output.splitlines()) == ["asked", "done", SAID.strip()]


def test_what_a_launcher_passes_on_of_the_same_one_counts_once(started):
    process = started(LOOP, "0.3")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert output.count(SAID) == 1


@pytest.mark.parametrize("program", [LOOP, STUCK], ids=["waiting in Python", "stuck in C"])
def test_a_second_one_ends_the_process_at_once(started, program):
    process = started(program, "60")
    process.send_signal(signal.SIGINT)
    while process.stdout.readline() != SAID:
        pass
    time.sleep(SAME_S)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began < 5


def test_everything_is_as_before_afterwards():
    def open_descriptors():
        return os.listdir("/proc/self/fd")

    before, threads = open_descriptors(), threading.active_count()
    handler = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupted:
        assert signal.getsignal(signal.SIGINT) != handler
        assert not interrupted()
    assert signal.getsignal(signal.SIGINT) == handler
    assert signal.set_wakeup_fd(-1) == -1
    assert (open_descriptors(), threading.active_count()) == (before, threads)


def test_another_thread_than_the_main_one_is_left_alone():
    interrupt = Interrupt()
    thread = threading.Thread(target=lambda: interrupt.__enter__().__exit__(None, None, None))
    thread.start()
    thread.join()
    assert not interrupt()
