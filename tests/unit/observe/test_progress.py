"""Progress: plain lines now and then, a live line on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from hvdtrain.observe.logger import EvalRecord, StepRecord
from hvdtrain.observe.progress import ProgressLogger, fitted
from hvdtrain.observe.quantities import in_duration


def step(number: int, **more) -> StepRecord:
    values = {"step": number, "epoch": 0, "total_steps": 9, "loss": 0.5, "lr": 0.1, "samples_per_second": 1234.5,
              "gradient_norm": None, "skipped": False, "seconds": 0.1}  # fmt: skip
    return StepRecord(**{name: values[name] for name in StepRecord.__dataclass_fields__ if name in values} | more)


def lines(every_s: float, *, terminal: bool = False) -> list[str]:
    said = io.StringIO()
    progress = ProgressLogger(1, Console(file=said, width=120, force_terminal=terminal), every_s)
    for number in range(1, 10):
        progress.log_step(step(number))
    progress.log_eval(EvalRecord(step=9, epoch=1, metrics={"accuracy": 0.75}))
    progress.close()
    return said.getvalue().splitlines()


def test_the_first_and_the_last_step_and_each_evaluation_are_shown():
    shown = lines(1e12)  # however long the machine has been up
    assert shown[0] == "step 1/9  epoch 1/1  loss 0.5000  1,234 samples/s  lr 0.1"  # nothing is known of the time left
    assert shown[1].startswith("step 9/9")
    assert shown[2:] == ["epoch 1/1 evaluated: accuracy 0.7500"]


def test_every_step_is_shown_if_it_is_time():
    assert len(lines(0.0)) == 10
    assert lines(0.0)[4].endswith("s left")


def test_a_terminal_gets_a_live_line_that_goes_away():
    assert any("samples/s" in line for line in lines(5.0, terminal=True))


def test_an_evaluation_without_training_has_no_epoch_to_name():
    said = io.StringIO()
    ProgressLogger(0, Console(file=said)).log_eval(EvalRecord(step=0, epoch=0, metrics={"loss": 0.25}))
    assert said.getvalue() == "evaluated: loss 0.2500\n"


FULL = {"gradient_norm": 0.53, "memory_bytes": 512_000_000, "sent_bytes_per_step": 34e6}


def test_learning_rate_gradient_norm_memory_and_bytes_are_shown():
    said = io.StringIO()
    progress = ProgressLogger(1, Console(file=said, width=40), 0.0)
    progress.log_step(step(1, **FULL))
    progress.log_step(step(2))  # nobody computed the norm of this step
    first, second = said.getvalue().splitlines()
    assert first.endswith("1,234 samples/s  lr 0.1  grad 0.53  mem 512 MB  sent 34 MB/step")
    assert "  grad 0.53" in second


@pytest.mark.parametrize("width", [1, 10, 24, 40, 60, 80, 100, 132, 200])
def test_no_line_is_longer_than_the_terminal(width):
    said = io.StringIO()
    progress = ProgressLogger(
        10, Console(file=said, width=width, force_terminal=True, soft_wrap=True, _environ={"TERM": "xterm"})
    )
    for number in range(1, 10):
        progress.log_step(step(number, **FULL))
    progress.close()
    # Each is written after the sequence that erases the one before.
    shown = [Text.from_ansi(part).plain for part in re.split(r"\r|\x1b\[2K|\n", said.getvalue())]
    lines = [line for line in shown if line.strip()]
    assert lines
    assert max(map(len, lines)) <= width
    assert said.getvalue().count("\n") <= 1
    expected = {
        200: ("━", "sent", "mem"),
        132: ("sent", "epoch"),
        80: ("loss", "step", "lr", "grad", "samples/s"),
        10: ("loss",),
    }
    assert all(word in lines[-1] for word in expected.get(width, ()))


def test_what_matters_least_is_left_out_first():
    fields = [(1, "step 7"), (0, "loss 0.5"), (2, "lr 0.1")]
    assert fitted(fields, 24) == "step 7  loss 0.5  lr 0.1"
    assert fitted(fields, 23) == "step 7  loss 0.5"
    assert fitted(fields, 15) == "loss 0.5"
    assert fitted(fields, 4) == "loss"
    assert fitted(fields, 0) == ""


def test_a_dumb_terminal_gets_plain_lines():
    said = io.StringIO()
    progress = ProgressLogger(1, Console(file=said, force_terminal=True, _environ={"TERM": "dumb"}))
    progress.log_step(step(9))
    progress.close()
    assert said.getvalue().startswith("step 9/9  epoch 1/1")


def test_times_are_said_in_units_that_fit():
    assert [in_duration(s) for s in (0.4, 119, 120, 7000, 7200, 90000)] == [
        "0 s", "119 s", "2 min", "117 min", "2 h 00 min", "25 h 00 min",
    ]  # fmt: skip


def test_names_of_metrics_are_no_markup_and_no_pictures():
    said = io.StringIO()
    metrics = {"precision[cat]": 0.25, "f1[/all]": 0.5, ":x:": 1.0}
    ProgressLogger(0, Console(file=said, width=200)).log_eval(EvalRecord(step=0, epoch=0, metrics=metrics))
    assert said.getvalue() == "evaluated: precision[cat] 0.2500  f1[/all] 0.5000  :x: 1.0000\n"
