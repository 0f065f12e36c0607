"""Copies of the Python that has PyTorch loaded run, end and die as a Python of its own does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import warm

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def both(words, **options):
    argv = [sys.executable, *words]
    options = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 60, **options}
    return (subprocess.run(each, check=False, **options) for each in (argv, warm.instead_of_python(argv)))


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "import sys; print(sys.argv, sys.path[:2], __name__); sys.exit(3)", "-x", "y"],
        ["-c", "import os; os.write(2, b'err'); print(input(), os.getcwd()); os._exit(4)"],
        ["-c", "import os, signal; print('lost'); os.kill(os.getpid(), signal.SIGSEGV)"],
        ["-c", "import os; os.kill(os.getpid(), 9)"],
        ["-u", "-c", "import os; print('kept'); os.abort()"],
        ["-c", "import sys; sys.exit('why')"],
        ["-c", "import torch, atexit; atexit.register(print, 'bye'); print(torch.get_num_threads())"],
        ["-m", "json.tool", "--help"],
        ["-m", "torch.distributed.run", "--help"],
        ["{file}", "one"],
        ["-W", "error", "-c", "import warnings; warnings.warn('x')"],
    ],
    ids=lambda words: " ".join(words)[:40],
)  # fmt: skip
def test_a_copy_says_and_ends_as_a_python_of_its_own_does(tmp_path, words):
    file = tmp_path / "script.py"
    file.write_text(
        "import sys, pickle\nclass A: pass\npickle.dumps(A())\nprint(__file__, sys.argv, sys.path[0], __spec__)\n"
    )
    words = [word.format(file=file) if word == "{file}" else word for word in words]
    own, copy = both(words, input="line\n", cwd=tmp_path)
    assert (copy.returncode, copy.stdout, copy.stderr) == (own.returncode, own.stdout, own.stderr)


@pytest.mark.parametrize("name", ["TORCH_LOGS", "PYTHONPATH", "MY_OWN"])
def test_its_environment_is_the_one_given(name):
    code = "import os, sys; print(sorted({**os.environ, 'PYTHON_EXEC': ''}.items()), sys.path)"
    own, copy = both(
        ["-c", code], env={**ENVIRONMENT, name: "/nowhere"} if name != "TORCH_LOGS" else {**ENVIRONMENT, name: "-all"}
    )
    assert copy.stdout == own.stdout


def test_random_numbers_are_other_ones_in_each_copy():
    code = "import torch, random, numpy; print(torch.rand(1), random.random(), numpy.random.rand())"
    argv = warm.instead_of_python([sys.executable, "-c", code])
    one, other = (
        subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert not set(one.split()) & set(other.split())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_a_signal_ends_it(tmp_path, number):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    argv = warm.instead_of_python([sys.executable, "-c", code])
    with subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(timeout=20) == -number
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("the copy lives on")
