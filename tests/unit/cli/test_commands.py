"""The command as users start it: real processes, exit codes, what is printed, and how fast."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from hvdtrain.cli.commands import COMMANDS, main
from hvdtrain.cli.voice import GRACE_S
from hvdtrain.version import __version__

ANSWER_S = 0.5
SCRIPT = Path(sys.executable).with_name("hvdtrain")


def environment(**extra: str) -> dict[str, str]:
    """Without what a launcher of the test run itself may have set."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "PYTHONPATH", "LANG") if key in os.environ}
    return {**kept, **extra}


def hvdtrain(*argv: str, folder: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hvdtrain", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=folder, env=environment(**extra)
    )


def test_help_shows_usage_the_groups_and_the_exit_codes() -> None:
    done = hvdtrain("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: hvdtrain [train] [FLAG VALUE ...]\n")
    for part in ("data:", "distributed:", "exit codes:", "75   asked to end", "130  interrupted"):
        assert f"{part}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert hvdtrain("train", "-h").stdout == done.stdout


def test_version_names_hvdtrain_torch_and_python() -> None:
    done = hvdtrain("--version")
    assert done.returncode == 0
    expected = f"hvdtrain {__version__}, torch {metadata.version('torch')}, Python {platform.python_version()}\n"
    assert done.stdout == expected


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["--print-config", "--model", "torchvision.models.resnet18", "--model.num_classes", "10"],
        ["--batch-size", "0"],
        ["--max-stps", "3"],
        ["--optimizer", "SGD", "--backend", "hvod"],
    ],
)
def test_help_and_argument_errors_answer_in_half_a_second_without_torch_and_numpy(argv: list[str]) -> None:
    code = f"import sys; from hvdtrain.cli import main; main({argv!r}); sys.exit(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment()
    )
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "hvdtrain.cli.train" in loaded
    assert not loaded & {"torch", "numpy", "torchvision", "rich", "hvdtrain.run"}
    before = os.times()
    hvdtrain(*argv)
    after = os.times()  # the processor's time: other work on the machine is not ours
    spent_s = after.children_user - before.children_user + after.children_system - before.children_system
    assert 0 < spent_s < ANSWER_S


def test_a_wrong_launch_is_answered_without_torch() -> None:
    code = "import sys; from hvdtrain.cli import main; main(['--epochs', '1']); sys.exit(' '.join(sys.modules))"
    wrong = {**os.environ, "RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=wrong
    )
    said, *_, loaded = done.stderr.splitlines()
    assert "WORLD_SIZE='two' is not a whole number" in said
    assert not set(loaded.split()) & {"torch", "numpy", "hvdtrain.run"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown subcommand 'trian'; did you mean 'train'? Subcommands: train, export, import, doctor, guard, verify, report, bench, migrate, install-horovod"),
        (["zzz"], "unknown subcommand 'zzz'. Subcommands: train, export, import, doctor, guard, verify, report, bench, migrate, install-horovod"),
        (["--max-stps", "3"], "unknown flag '--max-stps'; did you mean '--max-steps'?"),
        (["train", "--on-nan", "skp"], "--on-nan must be one of stop, skip, got 'skp'; did you mean 'skip'?"),
        (
            ["--backend", "hvod"],
            "--backend must be one of auto, local, torch, mpi, horovod, got 'hvod'; did you mean 'horovod'?",
        ),
        (["--config", "gone.yaml"], "--config: cannot read 'gone.yaml': No such file or directory"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_exit_code_2(argv: list[str], message: str) -> None:
    done = hvdtrain(*argv)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"hvdtrain: error: {message}\n"


@pytest.mark.skipif(not SCRIPT.exists(), reason="hvdtrain is not installed as a script beside this Python")
def test_the_script_and_the_module_are_one_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, "--epoch", "3"], capture_output=True, text=True, timeout=60, check=False, env=environment()
    )
    assert (done.returncode, done.stderr) == (2, hvdtrain("--epoch", "3").stderr)
    assert done.stderr == "hvdtrain: error: unknown flag '--epoch'; did you mean '--epochs'?\n"


def test_the_printed_configuration_goes_back_in_through_the_command(tmp_path: Path) -> None:
    first = hvdtrain("--print-config", "--lr", "1e-5", "--data.size", "[8, 8]", "--timeout", "2m")
    (tmp_path / "a.yaml").write_text(first.stdout)
    second = hvdtrain("--config", "a.yaml", "--print-config", folder=tmp_path)
    assert second.stdout == first.stdout
    assert "timeout: 120.0" in first.stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "hvdtrain", "--help"]
    with os.fdopen(write_end, "wb") as gone:
        done = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, timeout=60, check=False, env=environment())
    assert (done.returncode, done.stderr) == (0, b"")


def ranks(*argv: str) -> list[tuple[int, str, str, float]]:
    """Exit code, standard output, standard error and seconds of each of two ranks that run the command."""
    launcher = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    start = time.perf_counter()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "hvdtrain", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**launcher, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(2)
    ]
    found = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        found.append((process.returncode, out, err, time.perf_counter() - start))
    return found


def test_a_wrong_flag_is_told_by_rank_0_alone_and_at_once() -> None:
    (code0, out0, err0, wall0), (code1, out1, err1, _) = ranks("--max-stps", "3")
    assert (code0, code1) == (2, 2)
    assert err0 == "hvdtrain: error: unknown flag '--max-stps'; did you mean '--max-steps'?\n"
    assert (out0, out1, err1) == ("", "", "")
    assert wall0 < GRACE_S


def test_a_broken_file_is_told_by_every_rank_that_nobody_ended_meanwhile() -> None:
    (_, _, err0, _), (code1, _, err1, wall1) = ranks("--config", "gone.yaml")
    assert err0 == "hvdtrain: error: --config: cannot read 'gone.yaml': No such file or directory\n"
    assert (code1, err1) == (2, err0.replace("error: ", "error: rank 1: "))
    assert wall1 > GRACE_S


def test_help_is_printed_by_rank_0_alone() -> None:
    (_, out0, err0, _), (code1, out1, err1, _) = ranks("--help")
    assert out0.startswith("usage:")
    assert (code1, out1, err0, err1) == (0, "", "", "")


def test_half_a_launcher_is_no_reason_to_be_silent() -> None:
    done = hvdtrain("--max-stps", "3", RANK="1")
    assert done.returncode == 2
    assert done.stderr == "hvdtrain: error: unknown flag '--max-stps'; did you mean '--max-steps'?\n"


GREET = """
from hvdtrain.errors import Preempted, RankFailure, TrainingError

def run(argv):
    if argv == ["preempted"]:
        raise Preempted("saved at step 7; the same command goes on from there")
    if argv == ["failed"]:
        raise TrainingError("the loss is no tensor")
    if argv == ["rank"]:
        raise RankFailure("rank 3 failed", rank=3, rank_traceback="Traceback (of rank 3):\\n  boom\\n")
    if argv == ["interrupt"]:
        raise KeyboardInterrupt
    if argv == ["bug"]:
        raise ZeroDivisionError("ours")
    return len(argv)
"""


@pytest.fixture
def with_greet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    (tmp_path / "greet_command.py").write_text(GREET)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return {**COMMANDS, "greet": "greet_command"}


@pytest.mark.parametrize(
    ("word", "code", "message"),
    [
        ("preempted", 75, "hvdtrain: saved at step 7; the same command goes on from there; exit code 75\n"),
        ("failed", 1, "hvdtrain: error: the loss is no tensor\n"),
        ("rank", 1, "hvdtrain: error: rank 3 failed\nTraceback (of rank 3):\n  boom\n"),
        ("interrupt", 130, "hvdtrain: interrupted\n"),
        ("fine", 1, ""),
    ],
)
def test_a_subcommand_is_a_row_and_a_module_and_its_errors_are_exit_codes(
    with_greet: dict[str, str], capsys: pytest.CaptureFixture[str], word: str, code: int, message: str
) -> None:
    assert main(["greet", word], with_greet) == code
    assert capsys.readouterr().err == message


def test_an_error_that_nobody_raised_on_purpose_keeps_its_traceback(with_greet: dict[str, str]) -> None:
    with pytest.raises(ZeroDivisionError):
        main(["greet", "bug"], with_greet)


def test_the_words_of_the_process_are_taken_when_none_are_given(
    with_greet: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hvdtrain", "greet"])
    assert main(None, with_greet) == 0


def test_a_working_directory_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert main(["--max-steps", "1"]) == 2
    assert "the working directory was deleted" in capsys.readouterr().err
