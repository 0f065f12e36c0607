"""A guard around launchers of a few lines: who gets which signal, and with what everything ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

# A launcher and, but for "launcher", a rank below it that says what it gets; the exit codes are the launcher's.
LAUNCHER = """
import os, signal, subprocess, sys, time
from hvdtrain.launch.guard import tell_saved

def note(number, frame):
    print(signal.Signals(number).name, flush=True)
    if how == "saves":
        tell_saved()
        os._exit(75)
    if how == "hears" and number == signal.SIGTERM:
        os._exit(5)
    if how == "fails":
        os._exit(4)

how = sys.argv[1]
if how == "deaf":  # nothing to save yet
    print("ready", flush=True)
    time.sleep(60)
if sys.argv[2:] == ["rank"]:
    signal.signal(signal.SIGUSR1, note)
    signal.signal(signal.SIGTERM, note)
    print("ready", flush=True)
    time.sleep(60)
else:
    if how == "stuck":
        signal.signal(signal.SIGTERM, lambda *_: print("launcher SIGTERM", flush=True))
    child = subprocess.Popen([sys.executable, "-c", os.environ["LAUNCHER"], how, "rank"])
    if how == "hears":
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while child.poll() is None:
        time.sleep(0.02)
    sys.exit(1)
"""


def guarded(tmp_path: Path, how: str, *options: str, before: str = "") -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "hvdtrain", "guard", *options, sys.executable, "-c", LAUNCHER, how]
    argv = ["sh", "-c", f'{before} exec "$@"', "sh", *argv] if before else ["env", "--default-signal=HUP,INT", *argv]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "LAUNCHER": LAUNCHER}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_asks_the_ranks_to_stop_and_the_exit_code_says_that_they_saved(tmp_path, number):
    process = guarded(tmp_path, "saves")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert out == "SIGUSR1\n"
    assert process.returncode == 75
    assert err == (
        "hvdtrain guard: the run has saved its state and ended, so the exit code is 75 and not the launcher's 1\n"
    )


def test_ranks_that_fail_to_save_end_with_the_launchers_code(tmp_path):
    process = guarded(tmp_path, "fails")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("SIGUSR1\n", "", 1)


def test_before_there_is_anything_to_save_the_launcher_is_ended_at_once(tmp_path):
    process = guarded(tmp_path, "deaf")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == ("", 128 + signal.SIGTERM)


@pytest.mark.slow
def test_ranks_that_do_not_end_in_time_are_ended(tmp_path):
    process = guarded(tmp_path, "ignores", "--wait", "0.5")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)  # nobody holds the pipes any more
    assert (out, process.returncode) == ("SIGUSR1\n", 128 + signal.SIGTERM)
    assert "the rest is killed" in err


@pytest.mark.slow
def test_a_launcher_that_does_not_end_either_is_killed_with_all_its_processes(tmp_path):
    process = guarded(tmp_path, "stuck", "--wait", "0.5")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)  # nobody holds the pipes any more
    assert out == "SIGUSR1\nlauncher SIGTERM\n"
    assert "not everything ended within 10 s" in err
    assert process.returncode == 128 + signal.SIGKILL


def test_a_second_ctrl_c_waits_no_longer(tmp_path):
    process = guarded(tmp_path, "hears")
    assert process.stdout is not None
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGUSR1\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("SIGTERM\n", "", 1)


def test_nohup_keeps_its_promise(tmp_path):
    process = guarded(tmp_path, "saves", before="trap '' HUP;")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs a launcher"),
        (["--wait"], "give seconds"),
        (["--wait", "1e3", "true"], "give seconds"),
        (["--unknown", "true"], "needs a launcher"),
        (["/no/such/program"], "cannot be started: No such file"),
    ],
)
def test_wrong_words_are_refused(words, said):
    ended = subprocess.run(
        [sys.executable, "-m", "hvdtrain", "guard", *words], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_a_signal_it_is_not_noticed():
    for command, code in (("exit 3", 3), ("kill -9 $$", 137), ("cat", 0)):
        ended = subprocess.run(
            [sys.executable, "-m", "hvdtrain", "guard", "--", "sh", "-c", command],
            input="in", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (ended.returncode, ended.stdout, ended.stderr) == (code, "in" if command == "cat" else "", "")
