"""How a process ends that its engine would not let go: real processes, whose engine is a destructor that waits for ever."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from hvdtrain.errors import ConfigError, HvdtrainError, Preempted, RankFailure
from hvdtrain.ranks.exit import code_of

# The engine: a handler that was registered before ours, as engines' are when they are imported, and that never returns.
ENGINE = """
import atexit, logging, sys, time
logging.basicConfig(format="%(message)s", handlers=[logging.handlers.MemoryHandler(99, target=logging.StreamHandler())])
def engines_end():
    print("the engine waits", flush=True)
    time.sleep(60)
atexit.register(engines_end)
from hvdtrain.ranks import exit as end
class Nobody:  # to watch
    def leave(self, timeout_s):
        print("left", end=" ")
    def close(self):
        print("closed", end=" ")
"""


@dataclass
class Ended:
    code: int
    out: str
    err: str


def run(body: str) -> Ended:
    done = subprocess.run(
        [sys.executable, "-c", "import logging.handlers\n" + ENGINE + body],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def test_a_hard_end_shows_and_runs_everything_but_the_engines_own_end():
    ended = run("""
end.prepare(lambda code: print("farewell", code, flush=True))
atexit.register(lambda: print("the user's handler"))
print("not flushed", end=" ")
logging.warning("logged")
assert not end.ending()
end.end_hard(7)
end.end_hard(9)  # the first counts
assert end.ending()
raise ValueError("shown")
""")
    assert ended.code == 7
    assert ended.out == "not flushed the user's handler\nfarewell 7\n"
    assert "ValueError: shown" in ended.err
    assert "logged" in ended.err


def test_without_need_the_engine_ends_as_ever():
    ended = run("""
time.sleep = lambda s: None
end.prepare(lambda code: print("farewell"))
end.Goodbye(Nobody(), 1.0, lambda: False).at_exit()
""")
    assert (ended.code, ended.out, ended.err) == (0, "left the engine waits\n", "")


def test_an_exception_that_nobody_caught_ends_hard_with_its_code_and_one_traceback():
    ended = run("""
end.end_all_on_exception()
end.end_all_on_exception()
from hvdtrain.errors import ConfigError
raise ConfigError("planted")
""")
    assert (ended.code, ended.out) == (ConfigError.exit_code, "")
    assert ended.err.count("Traceback") == 1
    assert "planted" in ended.err


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise ValueError('planted' + 'x' * 20_000_000)", "ValueError: planted"),
        ("raise ExceptionGroup('many', [ValueError('planted') for _ in range(20_000)])", "many"),
    ],
)
def test_what_mpirun_would_take_a_minute_to_pass_on_is_shown_shortened(body, says):
    if "ExceptionGroup" in body and sys.version_info < (3, 11):
        pytest.skip("there are no exception groups before Python 3.11")
    ended = run(f"time.sleep = lambda s: None\nend.prepare()\n{body}")
    assert ended.code == 1
    assert says in ended.err
    assert len(ended.err) < 100_000


@pytest.mark.parametrize(
    ("watch", "stuck", "code", "said"),
    [
        ("Nobody", "False", 0, "left the engine waits"),
        ("Failing", "False", HvdtrainError.exit_code, "hvdtrain: rank 0 waited 1 s"),
        ("Nobody", "True", 1, "closed"),
    ],
)
def test_a_goodbye_is_said_unless_the_engine_is_stuck(watch, stuck, code, said):
    ended = run(f"""
from hvdtrain.errors import RankFailure
time.sleep = lambda s: None
class Failing(Nobody):
    def leave(self, timeout_s):
        raise RankFailure(f"rank 0 waited {{timeout_s:g}} s")
goodbye = end.Goodbye({watch}(), 1.0, lambda: {stuck})
goodbye.at_exit()
never = end.Goodbye(Failing(), 99.0, lambda: False)
never.at_exit()
never.never()
""")
    assert ended.code == code
    assert said in ended.out + ended.err
    assert ("the engine waits" in ended.out) is (code == 0)
    assert "99" not in ended.out + ended.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(), 1),
        (SystemExit(3), 3),
        (SystemExit(0), 1),
        (SystemExit("words"), 1),
        (KeyboardInterrupt(), 1),
        (ConfigError(""), 2),
        (RankFailure(""), 1),
        (Preempted(""), 75),
    ],
    ids=repr,
)
def test_the_exit_code_of_an_error_is_never_zero(error, code):
    assert code_of(error) == code
