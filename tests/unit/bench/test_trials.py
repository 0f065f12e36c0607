"""Trials of engines: what is read of a run, and which engine is chosen, as far as the rounds show it."""

from __future__ import annotations

import json

import pytest

from hvdtrain.bench.comparing import as_json, choose, table
from hvdtrain.bench.trial import Trial, read_trial
from hvdtrain.cli import main
from hvdtrain.errors import ConfigError


def trials(*rates: float) -> list[Trial]:
    return [Trial(samples_per_second=rate, step_s=0.01, exchange_s=0.002, memory_bytes=5e8) for rate in rates]


def test_the_engine_of_the_highest_median_is_chosen():
    choice = choose({"torch": trials(100, 110, 90), "mpi": trials(150, 140, 160)})
    assert (choice.best, choice.rivals) == ("mpi", ())
    assert choice.sentence == "mpi is the fastest: 150 samples/s, 1.50 times torch."


def test_one_that_was_as_fast_in_some_round_is_not_told_from_it():
    choice = choose({"torch": trials(100, 170, 90), "mpi": trials(150, 140, 160), "horovod": trials(1, 1, 1)})
    assert (choice.best, choice.rivals) == ("mpi", ("torch",))
    assert "these rounds do not tell it from torch (" in choice.sentence


def test_one_engine_alone_is_the_fastest():
    assert choose({"torch": trials(1234.4)}).sentence == "torch is the fastest: 1,234 samples/s."


def test_the_table_has_medians_and_the_spread_and_json_has_all():
    given = {"torch": trials(100, 110, 90)}
    assert table(given).splitlines()[1].split() == ["torch", "100", "90", "110", "10", "2", "500", "MB"]
    whole = json.loads(json.dumps(as_json(given, choose(given), world_size=2)))
    assert [each["samples_per_second"] for each in whole["rounds"]["torch"]] == [100, 110, 90]
    assert (whole["best"], whole["world_size"]) == ("torch", 2)


def test_a_trial_leaves_out_what_came_before_the_first_logged_step(tmp_path):
    phases = {"forward": [0.008, 0.008], "exchange": [0.001, 0.003]}
    records = [
        {"kind": "step", "step": 10 * n, "samples_per_second": rate, "train_seconds": s, "memory_bytes": 1e6 * n, "phase_seconds": phases}
        for n, rate, s in ((1, 10.0, 2.0), (2, 40.0, 3.0), (3, 55.0, 4.0))
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    trial = read_trial(tmp_path)
    assert trial.samples_per_second == pytest.approx((220 - 20) / 2)
    assert (trial.step_s, trial.exchange_s) == (pytest.approx(0.01), pytest.approx(0.002))
    assert trial.memory_bytes == 3e6
    (tmp_path / "metrics.jsonl").write_text(json.dumps(records[0]))
    with pytest.raises(ConfigError, match="too few logged steps"):
        read_trial(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scaling"], "hvdtrain bench scaling: there is engines"),
        (["engines", "--steps", "5"], "give at least 16"),
        (["engines", "--ranks", "none"], "give a number from 1 to 1024"),
        (["engines", "--rounds"], "--rounds needs a value"),
        (["engines", "--lr", "x"], "--lr"),
    ],
)
def test_wrong_words_are_refused_in_a_sentence(capsys, words, said):
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err
