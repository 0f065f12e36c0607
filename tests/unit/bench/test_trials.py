"""Trials of engines: what is read of a run, and which engine is chosen, as far as the rounds show it."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hvdtrain.bench.comparing import as_json, choose, rows
from hvdtrain.bench.trial import Trial, read_trial
from hvdtrain.cli import main
from hvdtrain.cli.bench import BENCHMARKS
from hvdtrain.cli.trials import Contender, conclude, contender_ran, workplace
from hvdtrain.errors import ConfigError, OutputError
from hvdtrain.launch.starting import Starter, starters
from hvdtrain.settings.flags import UsageError
from hvdtrain.settings.options import options_of


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
        (["engines", "--steps", "5"], "--steps must be at least 16, got 5"),
        (["engines", "--ranks", "none"], "--ranks must be a whole number, got 'none'"),
        (["engines", "--out", "--steps", "20"], "--out needs a value"),
        (["step", "--out", "a.svg", "--plot", "a.svg"], "--out and --plot are one file"),
        (["collectives", "--max-bytes", "4"], "all-gather cannot be cut for 2 ranks; give 16 or more"),
        (["scaling", "--max-bytes", "8"], "latency and bandwidth need three sizes"),
        (["step", "--limit", "soon"], "--limit must be seconds, or a duration"),
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


@pytest.mark.parametrize(
    "words", [["bench", name] for name in ("engines", "step", "collectives", "scaling")] + [["verify"]]
)
def test_no_engine_is_not_every_engine(capsys, words):
    assert main([*words, "--engines", ","]) == 2
    assert "--engines , names none" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["bench", "engines"], ["verify"]])
def test_help_version_and_configuration_are_shown_and_nothing_runs(capsys, words):
    assert main([*words, "--task", "my:Task", "--version"]) == 0
    assert capsys.readouterr().out.startswith("hvdtrain ")
    assert main([*words, "--lr", "0.25", "--ranks=3", "--print-config"]) == 0
    said = capsys.readouterr().out
    assert "lr: 0.25" in said
    assert "ranks" not in said
    assert main([*words, "-h"]) == 0
    assert "--ranks N" in capsys.readouterr().out


def test_every_benchmark_can_say_and_write_json_and_has_a_limit():
    for module in BENCHMARKS.values():
        wishes = next(of for name, of in vars(importlib.import_module(module)).items() if name.endswith("Wishes"))
        flags = {entry.flag for entry in options_of(wishes)}
        assert {"--ranks", "--engines", "--rounds", "--limit", "--json", "--out", "--plot"} <= flags


def test_a_result_is_written_before_it_is_said_and_has_no_nan(tmp_path, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputError, match="could not write to the standard output"):
            conclude({"a": [math.nan, {"b": math.inf}], "c": 1.5}, "text", tmp_path / "found.json")
    text = (tmp_path / "found.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, {"b": None}], "c": 1.5}


def test_what_several_ranks_would_start_is_refused(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with (
        pytest.raises(UsageError, match=r"hvdtrain bench starts its ranks itself, and .* has started 2 of it"),
        workplace("bench"),
    ):
        pass


def fill(made: list[Path]) -> None:
    with workplace("bench") as place:
        made.append(place)
        place.joinpath("x").symlink_to("/dev/full")
        place.joinpath("x").write_text("x")


def test_a_temporary_folder_that_is_full_and_a_working_folder_that_is_gone_are_said(monkeypatch, tmp_path):
    made: list[Path] = []
    with pytest.raises(OutputError, match="No space left on device; free space there, or set TMPDIR"):
        fill(made)
    assert not made[0].exists()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="the working directory was deleted"), workplace("bench"):
        pass


def test_a_start_that_hangs_is_ended_at_the_limit_and_said(tmp_path):
    (tmp_path / "hangs_bench.py").write_text("import time; time.sleep(600)")
    starter = Starter(name="python", backend="local", words=("env", f"PYTHONPATH={tmp_path}"))
    how = contender_ran(
        Contender(name="a", starter=starter), 1, "hangs_bench", tmp_path / "wish", tmp_path / "folder", limit_s=0.5
    )
    assert how.startswith("not done within ")


def test_launchers_are_named_as_they_are_typed():
    typed = {each.name: each.typed(3) for each in starters(gloo=True, mpi=False)}
    assert typed["torchrun"] == "torchrun --nproc-per-node 3"
    assert typed.get("mpirun", "mpirun -np 3 --bind-to none") == "mpirun -np 3 --bind-to none"
