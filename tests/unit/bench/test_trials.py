"""Trials of engines: what is read of a run, and which engine is chosen, as far as the rounds show it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hvdtrain.bench.comparing import as_json, choose, rows
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


@pytest.mark.parametrize(("rounds", "said"), [(1, "one round says little"), (2, "two rounds say little"), (3, "")])
def test_few_rounds_are_not_taken_for_certain(rounds, said):
    sentence = choose({"torch": trials(*[10] * rounds), "mpi": trials(*[20] * rounds)}).sentence
    assert ("little" in sentence) == bool(said)
    assert said in sentence


def test_one_engine_alone_is_the_fastest():
    assert choose({"torch": trials(1234.4)}).sentence == "torch is the fastest: 1,234 samples/s."


def test_the_table_has_medians_and_the_spread_and_json_has_all():
    given = {"torch": trials(100, 110, 90)}
    assert rows(given)[1] == ["torch", "100", "90", "110", "10", "2", "500 MB"]
    whole = json.loads(json.dumps(as_json(given, choose(given), commands={}, world_size=2), allow_nan=False))
    assert [each["samples_per_second"] for each in whole["rounds"]["torch"]] == [100, 110, 90]
    assert (whole["best"], whole["world_size"]) == ("torch", 2)


def test_joules_stand_in_the_table_where_they_could_be_read():
    known = [replace(trial, joules=30.0, samples=60.0) for trial in trials(100, 110)]
    assert [row[-1] for row in rows({"torch": known, "mpi": trials(1)})] == ["J/sample", "0.5", ""]


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
        (["collective"], "hvdtrain bench has no 'collective'; did you mean 'collectives'? There are engines, step"),
        (["engines", "--profile", "2:3"], "sets --profile itself; give it to hvdtrain train"),
        (["engines", "--epochs", "3"], "sets --epochs itself; leave it out"),
        (["engines", "--backend", "mpi"], "sets --backend itself; --engines says which"),
        (["engines", "--max-steps", "3"], "sets --max-steps itself; --steps says how many"),
        (["engines", "--launcher", "srun"], "--launcher srun: those that are here are torchrun"),
        (["engines", "--launcher", "torchrun", "--engines", "mpi"], "--engines mpi: torchrun can start torch here"),
        (["engines", "--steps", "5"], "give at least 16"),
        (["engines", "--ranks", "none"], "give a number from 1 to 1024"),
        (["engines", "--rounds"], "--rounds needs a value"),
        (["engines", "--lr", "x"], "--lr"),
    ],
)
def test_wrong_words_are_refused_in_a_sentence(capsys, words, said):
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_trained(capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    assert main(["bench", "engines", "--out", str(tmp_path / "taken" / "found.json")]) == 1
    shown = capsys.readouterr()
    assert "could not write" in shown.err
    assert shown.out == ""
