"""One rank fails, all end within seconds, non-zero, and the first failing rank's words are what is read."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from launching import HOROVOD_GLOO, HOROVOD_MPI, HOROVOD_MPIRUN, LAUNCHERS, MPI, ROOT, TORCH, Launch, missing, run

JOB = str(Path(__file__).with_name("fault_job.py"))
STARTUP_S = 60  # of three ranks on a busy machine; the time-out that would end a hang is longer


def engines(first: Launch) -> pytest.MarkDecorator:
    """Every engine in `make test-all`; in `make test` one, another for each kind of fault."""
    others = [launch for launch in (TORCH, MPI, HOROVOD_MPIRUN, HOROVOD_GLOO) if launch != first]
    return pytest.mark.parametrize(
        "launch", [first, *(pytest.param(launch, marks=pytest.mark.slow) for launch in others)], ids=str
    )


def job(launch: Launch, mode: str, timeout_s: int, ranks: int = 3) -> list[str]:
    """A job of three ranks, the second of which goes wrong in some way."""
    return launch.argv(ranks, JOB, mode, str(timeout_s), launch.backend)


@engines(TORCH)
@pytest.mark.parametrize(
    "mode", ["groups late", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("ok", "groups early"))]
)
def test_a_job_without_a_fault_ends_well_and_says_nothing(launch, mode):
    ended = run(job(launch, mode, 60))
    assert ended.code == 0, ended.output
    for rank in range(3):  # lines of several ranks may run into each other
        assert ended.output.count(f"rank {rank} done") == 1
    assert "hvdtrain" not in ended.output


@engines(HOROVOD_GLOO)
@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("raise", "planted in the model"),
        pytest.param("stream", "planted in the stream", marks=pytest.mark.slow),
        pytest.param("collective", "planted between collectives", marks=pytest.mark.slow),
    ],
)
def test_an_exception_on_one_rank_ends_all_and_its_traceback_is_shown_once(launch, mode, text):
    ended = run(job(launch, mode, 180), timeout_s=240)
    assert ended.code != 0
    assert ended.seconds < STARTUP_S + 10  # and not the timeout of 180 s
    # Launchers mark lines in their ways; torchrun's summary repeats the error, indented.
    shown = re.findall(rf"^(?:\[rank1\]: |\[1\]<stderr>:)?ValueError: {text}$", ended.output, re.M)
    assert len(shown) == 1, ended.output
    for other in (0, 2):
        assert f"[rank{other}]:" not in ended.output
        assert f"[{other}]<stderr>:Traceback" not in ended.output


KILLED = [
    *[(launch, 3) for launch in (TORCH, HOROVOD_GLOO, MPI)],
    # What horovodrun --mpi starts is an mpirun, and what ends two or four ranks is what ends three.
    *[pytest.param(launch, 3, marks=pytest.mark.slow) for launch in (HOROVOD_MPI, HOROVOD_MPIRUN)],
    *[
        pytest.param(launch, ranks, marks=pytest.mark.slow)
        for launch in (TORCH, HOROVOD_GLOO, HOROVOD_MPI, HOROVOD_MPIRUN, MPI)
        for ranks in (2, 4)
    ],
]


@pytest.mark.parametrize(("launch", "ranks"), KILLED, ids=str)
def test_a_rank_that_is_killed_ends_all(launch, ranks):
    ended = run(job(launch, "kill", 180, ranks), timeout_s=240)
    assert ended.code != 0
    assert ended.seconds < STARTUP_S + 10
    assert re.search(r"SIGKILL|signal 9|code -9|[Kk]illed", ended.output), ended.output


@engines(HOROVOD_MPIRUN)
@pytest.mark.parametrize("mode", ["exit", pytest.param("leave", marks=pytest.mark.slow)])
def test_a_rank_that_leaves_early_is_named(launch, mode):
    ended = run(job(launch, mode, 180), timeout_s=240)
    assert ended.code != 0
    assert ended.seconds < STARTUP_S + 15
    assert "rank 1" in ended.output
    assert "has left the program" in ended.output


@engines(TORCH)
def test_a_stalled_rank_ends_the_others_at_the_timeout_and_is_named(launch):
    ended = run(job(launch, "stall", 8))
    assert ended.code != 0
    assert ended.seconds < STARTUP_S + 8 + 10
    assert "missing: rank 1" in ended.output


@engines(MPI)
def test_a_collective_that_a_rank_does_not_call_names_the_rank_and_the_tensor(launch):
    ended = run(job(launch, "subset", 8))
    assert ended.code != 0
    assert ended.seconds < STARTUP_S + 8 + 10
    assert re.search(r"all_reduce\(op=sum\) of torch.float32 \(3, 5\) .*missing: rank 1", ended.output), ended.output


@pytest.mark.slow
@engines(HOROVOD_GLOO)
def test_a_message_that_is_not_sent_names_the_rank_that_did_not(launch):
    ended = run(job(launch, "message", 8))
    assert ended.code != 0
    assert ended.seconds < STARTUP_S + 8 + 10
    assert re.search(
        r"recv\(src=1\) over world failed on rank [02]; missing: rank 1 on \S+ \(computing", ended.output
    ), ended.output


ALONE = {
    "evaluate-step": "an evaluation after step 2, and rank \\d on .* it waits in ",
    "evaluate-fit": "an evaluation after step 2, and rank \\d at fit",
    "evaluate-evaluate": "the evaluation data differs between the ranks: .*20",
    "evaluate-leave": "has left the program .* in an evaluation after step 2",
    "save-step": "saving a checkpoint of step 2, and rank \\d on .* it waits in ",
}


@engines(TORCH)
@pytest.mark.parametrize(
    "mode",
    ["evaluate-step", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ALONE if mode != "evaluate-step")],
)
def test_what_rank_zero_does_alone_is_named_with_what_the_others_do(launch, mode):
    ended = run(job(launch, mode, 180), timeout_s=240)
    assert ended.code != 0
    assert ended.seconds < STARTUP_S + 15  # and not the timeout of 180 s
    assert re.search(ALONE[mode], ended.output), ended.output
    assert "every rank must" in ended.output or mode == "evaluate-evaluate"


@pytest.mark.parametrize(
    "backend", ["mpi", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "horovod"))]
)
def test_another_version_on_one_host_is_refused_and_both_are_named(tmp_path, backend):
    if missing("mpirun", backend):
        pytest.skip(missing("mpirun", backend))
    other = tmp_path / "other"
    shutil.copytree(ROOT / "hvdtrain", other / "hvdtrain", ignore=shutil.ignore_patterns("__pycache__"))
    file = other / "hvdtrain" / "version.py"
    file.write_text(re.sub(r'__version__ = ".*"', '__version__ = "9.9.9"', file.read_text()))
    job = [
        sys.executable,
        "-m",
        "hvdtrain",
        "--backend",
        backend,
        "--timeout",
        "30",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    mpirun = LAUNCHERS["mpirun"](1)[:-3]  # without "-np 1 python"
    argv = [*mpirun, "-np", "1", *job, ":", "-np", "1", "env", f"PYTHONPATH={other}", *job]
    ended = run(argv, timeout_s=60, cwd=tmp_path)
    assert ended.code not in (0, None)
    assert re.search(
        r"rank \d on \S+ has hvdtrain \S+, and rank \d on \S+ has hvdtrain \S+: install the same", ended.output
    )
    assert "9.9.9" in ended.output
    assert not (tmp_path / "run" / "summary.json").exists()
