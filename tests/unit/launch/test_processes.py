"""What is asked of ``/proc``, of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from hvdtrain.launch.processes import catches, descendants, started

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

CHILD = """
import signal, subprocess, sys, time
signal.signal(signal.SIGUSR1, lambda *_: None)
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(child.pid, flush=True)
input()
"""


def test_a_process_is_told_from_a_later_one_of_its_number():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = started(process.pid)
    assert began
    assert began == started(process.pid)
    assert int(began) >= int(started(os.getpid()))
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert started(process.pid) == ""  # ended, and nobody has asked how
    process.wait()
    assert started(process.pid) == ""


def test_children_of_children_and_the_signals_they_listen_to():
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    assert {process.pid, grandchild} <= set(descendants(os.getpid()))
    assert descendants(process.pid) == [grandchild]
    assert catches(process.pid, signal.SIGUSR1)
    assert not catches(process.pid, signal.SIGUSR2)
    assert not catches(grandchild, signal.SIGUSR1)
    assert not catches(2**22 + 1, signal.SIGUSR1)
    process.communicate("\n")
