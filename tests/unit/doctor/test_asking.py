"""Other processes may crash, hang, say nothing or too much: each is an answer."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hvdtrain.doctor.asking import Answer, ask, ask_python
from hvdtrain.horovod_build.running import OUT_OF_TIME

MPIRUN = [
    "-" * 74,
    "prterun detected that one or more processes exited with non-zero status,",
    "thus causing the job to be terminated. The first process to do so was:",
    "",
    "   Process name: [prterun-host-1@1,0]",
    "   Exit code:    7",
    "-" * 74,
]
KILLED = [
    "-" * 74,
    "prterun noticed that process rank 1 with PID 19391 on node host exited on",
    "signal 9 (Killed).",
    "-" * 74,
]
TORCHRUN = [
    "E1130 06:56:40.7 1 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9) local_rank: 1 (pid: 3) of binary: python",
    "Traceback (most recent call last):",
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    "=" * 55,
    "Failures:",
    "  rank      : 0 (local_rank: 0)",
    "  exitcode  : -15 (pid: 2)  (SIGTERM)",
    "  error_file: <N/A>",
    "-" * 55,
    "Root Cause (first observed failure):",
    "[0]:",
    "  rank      : 1 (local_rank: 1)",
    "  exitcode  : -9 (pid: 3)  (SIGKILL)",
    "  error_file: <N/A>",
    "  traceback : Signal 9 (SIGKILL) received by PID 3",
    "=" * 55,
]


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("import os; os.kill(os.getpid(), 11)", "died of SIGSEGV"),
        ("raise ValueError('planted')", "ValueError: planted (exit code 1)"),
        ("sys.exit(3)", "exit code 3"),
        ("import time; time.sleep(60)", "no answer in time"),
        ("print('x' * 3_000_000); import os; os._exit(7)", "(exit code 7)"),
        ("sys.stdout.buffer.write(bytes(range(256))); sys.exit(2)", "(exit code 2)"),
    ],
)
def test_a_process_that_says_no_facts_is_described(program, how):
    answer = ask_python(program, limit_s=3)
    assert answer.facts == []
    assert answer.how.endswith(how)


def test_facts_are_heard_amid_noise():
    answer = ask_python("print('noise', end=''); tell(a=1); print('more'); tell(b=[2])")
    assert answer.facts == [{"a": 1}, {"b": [2]}]


def test_a_program_that_is_not_there_is_an_answer():
    answer = ask(["/nowhere/at/all"])
    assert answer.code != 0
    assert "No such file" in answer.how


def test_a_rank_in_a_session_of_its_own_ends_with_who_started_it(tmp_path):
    file = tmp_path / "pid"
    program = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"pathlib.Path({str(file)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    assert ask_python(program, limit_s=5).code == OUT_OF_TIME
    state = Path(f"/proc/{file.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_what_is_asked_ends_by_the_signal_that_ends_who_asks(tmp_path):
    file = tmp_path / "pid"
    asks = f"from hvdtrain.doctor.asking import ask; ask(['sh', '-c', 'echo $$ > {file}; exec sleep 600'])"
    asker = subprocess.Popen([sys.executable, "-c", asks])
    while not (file.exists() and file.read_text().strip()):
        assert asker.poll() is None
    asker.send_signal(signal.SIGTERM)
    assert asker.wait(30) == 128 + signal.SIGTERM
    state = Path(f"/proc/{file.read_text().strip()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["[rank1]: ValueError: planted", "---", "  Errorcode: 1", "\0"], "ValueError: planted"),
        (["[1]<stderr>:RuntimeError: planted", "ended"], "RuntimeError: planted"),
        (["something", "\0"], "something"),
        (["[1, 2, 3] is no error"], "[1, 2, 3] is no error"),
        (["[1,0]<stderr>: OSError: planted", *MPIRUN], "OSError: planted"),
        (["hvdtrain: error: planted", "at last", *MPIRUN], "hvdtrain: error: planted"),
        (["planted: we stop here", *MPIRUN], "planted: we stop here"),
        (["ValueError: planted", "and more", *TORCHRUN], "ValueError: planted"),
        (["planted: we stop here", *TORCHRUN], "planted: we stop here; rank 1 was ended by a signal: SIGKILL"),
        (TORCHRUN, "rank 1 was ended by a signal: SIGKILL"),
        ([line.replace("-9", "3") for line in TORCHRUN], "rank 1: exit code 3"),
        (KILLED, "rank 1 was ended by a signal: Killed"),
    ],
)
def test_the_line_that_says_most_is_a_ranks_and_no_launchers(lines, told):
    assert Answer(code=1, lines=tuple(lines)).how == f"{told} (exit code 1)"
