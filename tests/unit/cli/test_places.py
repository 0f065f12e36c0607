"""The commands that name files: wrong words are answered at once, in one line, without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hvdtrain.cli import export, import_file
from hvdtrain.cli.commands import main


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["export"], "RUN|CHECKPOINT is missing; --help shows what to give"),
        (["export", "run", "--format", "torch"], "OUT is missing; --help shows what to give"),
        (["export", "run", "out", "more"], "unexpected argument 'more'; every setting is a flag with two dashes (--epochs 3)"),
        (["export", "run", "out", "--format", "hdf5"], "--format must be one of safetensors, torch, dcp, got 'hdf5'"),
        (["export", "run", "out", "--optimiser"], "unknown flag '--optimiser'; did you mean '--optimizer'?"),
        (["import", "file"], "RUN is missing; --help shows what to give"),
        (["import", "file", "run", "--trust"], "unknown flag '--trust'; did you mean '--trusted'?"),
        (["report", "--out", "page"], "RUN is missing; --help shows what to give"),
        (["report", "run", "--format", "torch"], "unknown flag '--format'; --help lists the flags"),
        (["train", "run"], "unexpected argument 'run'; every setting is a flag with two dashes (--epochs 3)"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err == f"hvdtrain: error: {message}\n"


@pytest.mark.parametrize("command", [export, import_file])
def test_help_shows_both_files_and_the_flags(capsys: pytest.CaptureFixture[str], command) -> None:
    assert command.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: hvdtrain ")
    assert "--[no-]optimizer" in shown


def test_words_and_flags_may_be_mixed(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    assert main(["export", "--format=torch", str(tmp_path), "--optimizer", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"hvdtrain: error: {tmp_path} has no checkpoint; name a run's folder")


def test_a_wrong_word_is_answered_without_torch() -> None:
    code = "import sys; from hvdtrain.cli import main; main(['export']); main(['import', '-h']); sys.exit(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "hvdtrain.cli.import_file" in loaded
    assert not loaded & {"torch", "numpy", "rich", "hvdtrain.exchange"}
