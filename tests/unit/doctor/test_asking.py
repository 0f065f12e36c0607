"""Other processes may crash, hang, say nothing or too much: each is an answer."""

from __future__ import annotations

import pytest

from hvdtrain.doctor.asking import ask, ask_python


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
