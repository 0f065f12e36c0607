"""Programs of a build end in time, with everything they started, and all they said is in the log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import venv

import pytest

from hvdtrain.horovod_build.running import OUT_OF_TIME, Log, pip, run


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path / "logs" / "build.log")
    yield log
    log.close()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, limit_s=60.0) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_output_goes_to_the_watcher_and_to_the_log(tmp_path, log):
    seen = []
    code, lines = run(
        ["sh", "-c", "echo one; echo two >&2; exit 3"],
        log=log, environment=os.environ, folder=tmp_path, limit_s=20, watch=seen.append,
    )  # fmt: skip
    assert code == 3
    assert sorted(lines) == ["one", "two"]
    assert sorted(line.strip() for line in seen) == ["one", "two"]
    assert {"one", "two", "$ sh -c echo one; echo two >&2; exit 3"} <= set(log.path.read_text().splitlines())


def test_a_program_that_takes_too_long_ends_with_its_children(tmp_path, log):
    began = time.monotonic()
    code, lines = run(
        ["sh", "-c", "sleep 60 & echo $!; wait"], log=log, environment=os.environ, folder=tmp_path, limit_s=1.0
    )
    assert code == OUT_OF_TIME
    assert time.monotonic() - began < 15
    assert "it was ended after 1 s" in lines[-1]
    assert wait_for(lambda: not alive(int(lines[0])))


def test_a_daemon_that_holds_the_output_open_holds_nobody_up(tmp_path, log):
    began = time.monotonic()
    code, lines = run(["sh", "-c", "sleep 30 & echo $!"], log=log, environment=os.environ, folder=tmp_path, limit_s=60)
    os.kill(int(lines[0]), 9)
    assert code == 0
    assert time.monotonic() - began < 15


def test_an_interrupt_ends_what_was_started(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from hvdtrain.horovod_build.running import Log, run\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "run(['sh', '-c', 'echo $$ > pid; sleep 60'], log=Log(Path('log')), environment=os.environ,"
        " folder=Path('.'), limit_s=60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    pid = tmp_path / "pid"
    assert wait_for(lambda: pid.is_file() and pid.read_text().strip())
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(timeout=30) != 0
    finally:
        process.kill()
        process.wait()
    assert wait_for(lambda: not alive(int(pid.read_text())))


def test_a_program_that_is_not_there_is_a_failure_with_its_name(tmp_path, log):
    code, lines = run(["no-such-program-here"], log=log, environment=os.environ, folder=tmp_path, limit_s=5)
    assert code == 127
    assert "no-such-program-here" in lines[0]


def test_the_environment_is_exactly_the_one_given(tmp_path, log):
    code, lines = run([sys.executable, "-c", "import os; print(sorted(os.environ))"],
                      log=log, environment={"ONLY": "1"}, folder=tmp_path, limit_s=20)  # fmt: skip
    assert code == 0
    assert "'ONLY'" in lines[0]
    assert "'HOME'" not in lines[0]


def test_pip_runs_also_where_the_environment_has_none(tmp_path, log):
    """ensurepip's own wheel serves: uv makes environments without pip."""
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    code = "from hvdtrain.horovod_build.running import pip; import subprocess; subprocess.run([*pip(), '--version'], check=True)"
    answer = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if not path.endswith("site-packages"))},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert ".whl" in answer.stdout
    assert pip()[:3] == [sys.executable, "-m", "pip"]


def test_an_interrupt_at_any_moment_leaves_nothing_behind(tmp_path):
    """Around fork and exec too, where nobody holds the process yet, and inside Python's own locks: it is heard at once."""
    program = (
        "import os, random, signal, sys, time; from pathlib import Path\n"
        "from hvdtrain.horovod_build.running import Log, run; from hvdtrain.launch.processes import descendants\n"
        "log = Log(Path('log')); interrupted = late = 0\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "for _ in range(600):\n"
        "    begun = time.monotonic()\n"
        "    try:\n"
        "        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, random.choice([1e-3, 4e-3])))\n"
        "        run(['sleep', '600'], log=log, environment=os.environ, folder=Path('.'), limit_s=60)\n"
        "    except KeyboardInterrupt:\n"
        "        interrupted += 1\n"
        "    late += time.monotonic() - begun > 5\n"
        "print(interrupted, late, descendants(os.getpid()))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert answer.stdout == "600 0 []\n", answer.stdout + answer.stderr
