"""Progress: plain lines now and then, a live line on a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from hvdtrain.observe.logger import EvalRecord, StepRecord
from hvdtrain.observe.progress import ProgressLogger


def step(number: int, **more) -> StepRecord:
    values = {"step": number, "epoch": 0, "total_steps": 9, "loss": 0.5, "lr": 0.1, "samples_per_second": 1234.5,
              "gradient_norm": None, "skipped": False, "seconds": 0.1}  # fmt: skip
    return StepRecord(**{name: values[name] for name in StepRecord.__dataclass_fields__ if name in values} | more)


def lines(every_s: float, *, terminal: bool = False) -> list[str]:
    said = io.StringIO()
    progress = ProgressLogger(Console(file=said, width=120, force_terminal=terminal), 1, every_s)
    for number in range(1, 10):
        progress.log_step(step(number))
    progress.log_eval(EvalRecord(step=9, epoch=1, metrics={"accuracy": 0.75}))
    progress.close()
    return said.getvalue().splitlines()


def test_the_first_and_the_last_step_and_each_evaluation_are_shown():
    shown = lines(1e12)  # however long the machine has been up
    assert shown[0] == "step 1/9  epoch 1/1  loss 0.5000  1,234 samples/s"  # nothing is known of the time left
    assert shown[1].startswith("step 9/9")
    assert shown[2:] == ["epoch 1/1 evaluated: accuracy 0.7500"]


def test_every_step_is_shown_if_it_is_time():
    assert len(lines(0.0)) == 10
    assert lines(0.0)[4].endswith("s left")


def test_a_terminal_gets_a_live_line_that_goes_away():
    assert any("samples/s" in line for line in lines(5.0, terminal=True))


def test_an_evaluation_without_training_has_no_epoch_to_name():
    said = io.StringIO()
    ProgressLogger(Console(file=said), 0).log_eval(EvalRecord(step=0, epoch=0, metrics={"loss": 0.25}))
    assert said.getvalue() == "evaluated: loss 0.2500\n"
