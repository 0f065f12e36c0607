"""Reports of runs, whatever their folders hold: sentences, never a traceback."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.cli import main
from hvdtrain.report.metrics import chosen_metrics
from hvdtrain.report.page import page
from hvdtrain.report.reading import MOST_POINTS, read_run
from hvdtrain.report.telling import phases_of, stragglers, throughput
from hvdtrain.version import __version__

pytest.importorskip("matplotlib", reason="hvdtrain[report] is not installed")


def step(number: int, **more: Any) -> dict[str, Any]:
    phases = {"data": [0.001, 0.001], "forward": [0.002, 0.006], "backward": [0.002, 0.002], "exchange": [0.005, 0.001]}
    record = {
        "kind": "step", "step": number, "total_steps": 60, "epoch": 0, "loss": 1 / number, "lr": 0.1, "samples_per_second": 100.0,
        "gradient_norm": 0.5, "sent_bytes_per_step": 1e6, "memory_bytes": 5e8, "train_seconds": number / 10, "phase_seconds": phases,
    }  # fmt: skip
    return {**record, **more}


def folder(
    path: Path, *records: Any, summary: Any = None, config: str | None = "lr: 0.1\nhorovod:\n  op: sum\n"
) -> Path:
    path.mkdir(parents=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if summary is not None:
        (path / "summary.json").write_text(summary if isinstance(summary, str) else json.dumps(summary))
    if config is not None:
        (path / "config.yaml").write_text(config)
    return path


START = {"kind": "start", "step": 0, "environment": {"backend": "mpi", "world_size": 2, "hvdtrain": __version__}}
EVAL = {"kind": "eval", "step": 60, "epoch": 1, "eval_loss": 0.2, "eval_accuracy": 0.9}
SUMMARY = {"backend": "mpi", "engine": "Open MPI", "steps": 60, "hvdtrain_version": __version__}
HEADINGS = ["Numbers", "Loss", "Accuracy", "Throughput", "Where the time of a step goes", "Stragglers", "The same over the run",
            "Slow and fast ranks", "Learning rate", "Gradient norm", "Memory", "Bytes sent", "Configuration", "Environment"]  # fmt: skip


class Page(HTMLParser):
    """What a page says, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.loads: list[str] = []
        self._in: str = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._in = tag
        if tag in ("script", "link", "img", "iframe", "image"):
            self.loads.append(tag)
        self.loads += [
            str(value) for name, value in attributes if name in ("src", "href") and not str(value).startswith("#")
        ]

    def handle_data(self, data: str) -> None:
        if self._in == "h2" and data.strip():
            self.headings.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._in = ""


def report(*places: Path, out: Path | None = None) -> str:
    words = [] if out is None else ["--out", str(out)]
    assert main(["report", *map(str, places), *words]) == 0
    return ((out or places[0] / "report") / "report.html").read_text()


def test_a_run_becomes_one_page_that_needs_nothing_else_and_a_picture_a_heading(tmp_path, capsys):
    run = folder(tmp_path / "run", START, *map(step, range(10, 70, 10)), EVAL, summary=SUMMARY)
    page = Page(text := report(run))
    assert capsys.readouterr().out == f"wrote {run}/report/report.html, and a PNG of each picture beside it\n"
    assert page.headings == HEADINGS
    assert page.loads == []
    assert len(text) < 400_000
    pictures = sorted((run / "report").glob("*.png"))
    assert len(pictures) == text.count("<svg") == 10
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert "mpi (Open MPI)" in text
    assert "class='remarks'" not in text
    unfinished = report(folder(tmp_path / "unfinished", step(10)))
    assert re.findall(r"<li>([^<]*)", unfinished)[0].startswith("there is no summary.json")
    assert "horovod.op" in text


@pytest.mark.slow  # drawing takes seconds on a busy machine
def test_several_runs_are_laid_over_each_other_and_what_differs_is_marked(tmp_path):
    runs = [
        folder(
            tmp_path / name / "run",
            START,
            *map(step, range(10, 70, 10)),
            EVAL,
            summary=SUMMARY,
            config=f"lr: {lr}\nseed: 0\n",
        )
        for name, lr in (("a", 0.1), ("b", 0.2))
    ]
    text = report(*runs, runs[0], out=tmp_path / "both")
    assert f"run ({runs[0]})" in text  # of one name, so by their folders
    differing = re.findall(r"<tr class=differs><th>([^<]*)", text)
    assert "lr" in differing
    assert "seed" not in differing
    assert (
        text.count("<th>run (") == 4 * 2
    )  # numbers, what differs, all settings, environment: the third is the first again


@pytest.mark.parametrize(
    ("records", "summary", "said"),
    [
        ([START], None, "there is no logged step and no evaluation yet"),
        ([step(10)], None, "the run has not finished, or was ended; the last logged step is 10 of 60"),
        ([step(10), '{"kind": "step", "st'], SUMMARY, "1 of 2 lines of metrics.jsonl could not be read and are left out; the first is line 2"),
        ([step(10), "[1, 2]", "null", '{"kind": 7}', '{"step": 1}', "[" * 100_000], SUMMARY, "5 of 6 lines"),
        ([step(10, loss=None), step(20, loss=None), step(30)], SUMMARY, "the loss was not finite at 2 logged steps, first at step 10"),
        ([step(10)], SUMMARY, "there is no evaluation"),
        ([step(10)], {"hvdtrain_version": "99.0"}, f"it was written by hvdtrain 99.0, and this is {__version__}"),
        ([step(10, phase_seconds=None)], SUMMARY, "there are no phase times"),
        ([step(10)], "{", "summary.json is damaged and left out"),
        ([START, step(10), {**START, "step": 10}, step(20)], SUMMARY, "it was started 2 times, again after step 10"),
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_said(tmp_path, records, summary, said):
    run = read_run(folder(tmp_path / "run", *records, summary=summary), "run")
    assert any(said in remark for remark in run.remarks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "record",
    [
        step(10, loss=None),
        step(10, loss=1e308, lr=-1e308, gradient_norm=1e-320),
        step(10, loss=10**400, step=3),
        step(10, loss="1.0", lr=True, memory_bytes=[], phase_seconds={}),
        step(10, phase_seconds={"data": []}),
        step(10, phase_seconds={"data": [1, 2], "forward": [1]}),
        step(10, phase_seconds={"a new phase": [0.1], "data": [None], "<b>": ["x"]}),
        step(10, phase_seconds={"data": [0.0]}),
        step(10, phase_seconds={"data": [0.001 * rank for rank in range(500)]}),
        step(10, train_seconds=0.0, samples_per_second=None),
        step(-5, total_steps=None),
        {"kind": "step", "step": 1},
        {
            "kind": "eval",
            "step": 1,
            "eval_$x^2$": 1.0,
            "eval_<script>alert(1)</script>": 2.0,
            "eval_\n": None,
            "eval_": 1,
        },
    ],
)
def test_odd_records_are_drawn_or_left_out(tmp_path, record):
    text = report(folder(tmp_path / "run", record, record))
    assert "<script" not in text
    assert "<h2 id='environment'>" in text


@pytest.mark.slow
def test_names_and_settings_are_text_and_no_html(tmp_path):
    name = "<script>alert(1)</script> & $x_1$ \u202e 😀"
    run = folder(
        tmp_path / name.replace("/", "-"), step(10), step(20), EVAL, config="model: <img src=x onerror=alert(1)>\n"
    )
    other = folder(tmp_path / "other", step(10), step(20), EVAL)
    for text in (report(run), report(run, other, out=tmp_path / "out")):
        assert "<script" not in text
        assert "<img" not in text
        assert "&lt;img src=x onerror=alert(1)&gt;" in text


def test_a_file_of_very_many_lines_is_thinned_evenly_and_keeps_its_ends(tmp_path):
    count = 5 * MOST_POINTS + 3
    lines = (json.dumps({"kind": "step", "step": number, "loss": 1.0}) for number in range(1, count + 1))
    run = read_run(folder(tmp_path / "run", *lines), "run")
    steps = [record["step"] for record in run.steps]
    assert MOST_POINTS / 2 < len(steps) <= MOST_POINTS + 1
    assert (steps[0], steps[-1]) == (1, count)
    assert len({b - a for a, b in pairwise(steps[:-1])}) == 1


def test_a_line_without_an_end_is_damaged_and_the_next_is_read(tmp_path):
    run = read_run(folder(tmp_path / "run", "x" * 9_000_000, step(10)), "run")
    assert [record["step"] for record in run.steps] == [10]
    assert "1 of 2 lines" in run.remarks[0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "is no folder; give the folder of a run"),
        (lambda path: path.write_text("x"), "is no folder"),
        (lambda path: path.mkdir(), "holds no metrics.jsonl: it is no run's folder, or that of a run without a logged step yet"),
        (lambda path: (path / "metrics.jsonl").mkdir(parents=True), "holds no metrics.jsonl"),
        (lambda path: (path.mkdir(), os.mkfifo(path / "metrics.jsonl")), "holds no metrics.jsonl"),
    ],
)  # fmt: skip
def test_a_folder_that_is_none_of_a_run_is_refused_in_a_sentence(tmp_path, capsys, make, said):
    make(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err


def test_wrong_words_are_refused_in_a_sentence(tmp_path, capsys):
    assert main(["report"]) == 2
    assert "RUN is missing" in capsys.readouterr().err
    run = folder(tmp_path / "run", step(10))
    places = [shutil.copytree(run, tmp_path / str(number)) for number in range(11)]
    assert main(["report", *map(str, places)]) == 2
    assert "at most 10" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["report", str(run), "--out", str(tmp_path / "file" / "below")]) == 1
    assert "choose another --out" in capsys.readouterr().err


def test_a_slow_rank_is_named_with_the_phase_in_which_it_is_slow(tmp_path):
    run = read_run(folder(tmp_path / "run", *map(step, (10, 20, 30))), "run")
    said = stragglers(phases_of(run, typical=True))
    assert said[0].startswith(
        "Rank 1 takes 9 ms of its own in a step, 1.8 times the median rank's; most of the difference is in forward"
    )
    alike = {"data": [0.001] * 3, "exchange": [0.5, 0.1, 0.1]}
    run = read_run(folder(tmp_path / "alike", step(10, phase_seconds=alike)), "run")
    assert stragglers(phases_of(run)) == ["No rank takes more than 10% longer than the median rank."]


def test_throughput_is_that_between_logged_steps_and_begins_anew_with_the_run(tmp_path):
    records = [
        step(10, train_seconds=1.0, samples_per_second=100.0),
        step(20, train_seconds=2.0, samples_per_second=150.0),
        step(30, train_seconds=0.5, samples_per_second=80.0),  # started again
        step(40, train_seconds=1.0, samples_per_second=100.0),
    ]
    run = read_run(folder(tmp_path / "run", *records), "run")
    assert throughput(run) == ([10, 20, 30, 40], pytest.approx([100.0, 200.0, 80.0, 120.0]))
    assert not any(math.isnan(rate) for rate in throughput(run)[1])


def test_a_start_that_is_slower_than_the_one_before_begins_anew_too(tmp_path):
    records = [
        START,
        step(10, train_seconds=1.0, samples_per_second=100.0),
        {**START, "step": 10},
        step(20, train_seconds=4.0, samples_per_second=50.0),  # 200 samples of its own, and not 100 more than before
        {**START, "step": 20},
        step(30, train_seconds=5.0, samples_per_second=20.0),
        step(40, train_seconds=7.0, samples_per_second=60.0),
    ]
    run = read_run(folder(tmp_path / "run", *records), "run")
    assert throughput(run) == ([10, 20, 30, 40], pytest.approx([100.0, 50.0, 20.0, 160.0]))


def test_phases_are_those_since_the_world_had_its_last_size_without_the_first_record_of_each_start(tmp_path):
    def of(number: int, seconds: float, ranks: int = 2) -> dict[str, Any]:
        return step(number, phase_seconds={"forward": [seconds] * ranks})

    records = [START, of(10, 90.0), of(20, 80.0), START, of(30, 70.0, 3), START, of(40, 60.0), of(50, 1.0), START]
    records += [of(60, 50.0), of(70, 3.0)]
    run = read_run(folder(tmp_path / "run", *records), "run")
    assert phases_of(run).seconds == {"forward": [2.0, 2.0]}


@pytest.mark.parametrize(
    ("environment", "summary"),
    [
        ("{}", '{"wall_seconds": Infinity, "steps": NaN}'),
        ("{}", f'{{"steps": 1{"0" * 400}, "wall_seconds": 1{"0" * 400}}}'),
        (f'{{"hosts": {"[" * 450}{"]" * 450}, "hvdtrain": {"[" * 450}{"]" * 450}}}', None),
        ('{"places": ' + '{"a":' * 450 + "1" + "}" * 451, '{"backend": ' + "[" * 450 + "]" * 450 + "}"),
    ],
)
def test_numbers_beyond_all_bounds_and_nesting_without_end_are_no_trouble(tmp_path, environment, summary):
    start = f'{{"kind": "start", "step": 0, "environment": {environment}}}'
    report(folder(tmp_path / "run", start, step(10, phases=3, start=7), step(20), summary=summary))


def test_metrics_whose_names_differ_only_in_signs_that_no_file_has_keep_their_pictures(tmp_path):
    evaluated = {**EVAL, "eval_精度": 0.5, "eval_損失": 0.4, "eval_mAP": 0.3, "eval_map": 0.2}
    place = folder(tmp_path / "run", step(10), step(20), evaluated)
    page = report(place)
    shown = re.findall(r"<h2 id='(eval_[^']*)'", page)
    assert len({name.lower() for name in shown}) == len(shown) == 5
    assert {f"{name}.png" for name in shown} == {file.name for file in (place / "report").glob("eval_*.png")}
    assert ">MAP</h2>" in page  # not Map


def test_a_picture_takes_the_place_of_a_link_or_a_pipe_and_does_not_write_into_it(tmp_path):
    place = folder(tmp_path / "run", step(10), step(20))
    (tmp_path / "mine").write_text("precious")
    (place / "report").mkdir()
    (place / "report" / "loss.png").symlink_to(tmp_path / "mine")
    os.mkfifo(place / "report" / "memory.png")
    report(place)
    assert (tmp_path / "mine").read_text() == "precious"
    assert all((place / "report" / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "memory.png"))


def test_links_in_a_circle_and_a_working_folder_that_is_gone_are_said_in_a_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "circle").symlink_to("circle")
    assert main(["report", str(tmp_path / "circle")]) == 2
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["report", "run"]) == 2
    said = capsys.readouterr().err
    assert said.count("give the folder of a run") == 2
    assert "Traceback" not in said


def test_metrics_beyond_what_is_drawn_are_named_and_can_be_chosen(tmp_path, capsys):
    many = {f"eval_class_{number:02}": 0.5 for number in range(30)}
    runs = [read_run(folder(tmp_path / "run", step(10), {**EVAL, **many}), "run")]
    wanted, said = chosen_metrics(runs, None)
    assert len(wanted) == 24
    assert said.startswith("24 of 31 metrics are drawn, and these are not: class_23, class_24, class_25")
    assert "--metrics" in said
    assert chosen_metrics(runs, ["class_2*", "accuracy"])[0] == [
        "eval_accuracy",
        *(f"eval_class_{n}" for n in range(20, 30)),
    ]
    assert main(["report", str(tmp_path / "run"), "--metrics", "class_29,acuracy"]) == 2
    assert "--metrics acuracy: no evaluation has such a metric; did you mean 'accuracy'?" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "run"), "--metrics", "class_29"]) == 0
    assert [file.name for file in (tmp_path / "run" / "report").glob("eval_*")] == ["eval_class_29.png"]


def test_a_page_says_which_metrics_it_left_out(tmp_path):
    evaluated = {**EVAL, **{f"eval_{number}": 0.5 for number in range(30)}}
    folder(tmp_path / "run", evaluated, evaluated)
    runs = [read_run(tmp_path / "run", "run")]
    runs[0].remarks.append(chosen_metrics(runs, None)[1])
    assert "24 of 31 metrics are drawn" in page(runs, [])
