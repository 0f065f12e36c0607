"""A Horovod script as it is, and as `hvdtrain migrate` makes it: the same numbers, on every engine."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from launching import BIN, HOROVOD_MPIRUN, LOCAL, MPI, TORCH, Ended, run

from hvdtrain.cli.commands import main
from hvdtrain.horovod.__main__ import main as way_in

SCRIPT = Path(__file__).with_name("horovod_script.py")
WAY_IN = ("-m", "hvdtrain.horovod")


def losses(ended: Ended) -> list[tuple[float, float]]:
    assert ended.code == 0, ended.output
    found = re.findall(r"^epoch \d+ loss (\S+) worst (\S+)$", ended.output, re.M)
    return [(float(loss), float(worst)) for loss, worst in found]


def migrated(tmp_path: Path, *flags: str) -> Path:
    script = tmp_path / "train.py"
    shutil.copy(SCRIPT, script)
    assert main(["migrate", *flags, "--write", str(script)]) == 0
    assert "horovod.torch" not in script.read_text()
    return script


def close(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> bool:
    return len(one) == len(other) == 2 and all(
        a == pytest.approx(b, rel=1e-12) for a, b in zip(one, other, strict=True)
    )


def test_a_script_gives_the_same_losses_alone_unchanged_and_on_two_ranks_with_a_loop_of_its_own(tmp_path):
    unchanged = losses(run(LOCAL.argv(1, *WAY_IN, str(SCRIPT))))
    own = migrated(tmp_path, "--own-loop")
    assert "hvd." not in own.read_text()
    assert close(unchanged, losses(run(TORCH.argv(2, str(own)))))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["unchanged", "imports", "own-loop"])
@pytest.mark.parametrize("launch", [TORCH, MPI, HOROVOD_MPIRUN], ids=str)
def test_every_form_gives_real_horovods_losses_on_every_engine(tmp_path, form, launch):
    real = losses(run(HOROVOD_MPIRUN.argv(2, str(SCRIPT))))
    argv = {
        "unchanged": [*WAY_IN, "--backend", launch.backend, str(SCRIPT)],
        "imports": [str(migrated(tmp_path))] if form == "imports" else [],
        "own-loop": [str(migrated(tmp_path, "--own-loop"))] if form == "own-loop" else [],
    }[form]
    assert close(real, losses(run(launch.argv(2, *argv), HVDTRAIN_BACKEND=launch.backend)))


def alone(tmp_path: Path, script: str, *words: str, before: tuple[str, ...] = (), **environment: str) -> Ended:
    (tmp_path / "script.py").write_text(script)
    return run([sys.executable, *WAY_IN, *before, "script.py", *words], cwd=tmp_path, cold=True, **environment)


NAMES = """\
import sys
import horovod
import horovod.torch as hvd
import horovod.torch.elastic, horovod.torch.compression, horovod.common.process_sets
from horovod import run, torch
from horovod.torch import *
from horovod.torch.mpi_ops import allreduce as mine, Sum
from horovod.torch.elastic.state import TorchState
from horovod.common.exceptions import HorovodInternalError, HostsUpdatedInterrupt
import hvdtrain.horovod

assert hvd is torch and hvd.elastic.TorchState is TorchState is horovod.torch.elastic.TorchState
assert mine is allreduce is hvdtrain.horovod.allreduce and run is horovod.run and rank is hvd.rank
assert hvd.HorovodInternalError is HorovodInternalError and horovod.__version__ == "0.28.1"
assert (__name__, __file__, sys.argv) == ("__main__", "script.py", ["script.py", "--lr", "0.1"])
for name in "tensorflow", "tensorflow.keras", "keras", "mxnet", "spark", "ray", "common.util":
    try:
        __import__(f"horovod.{name}")
    except ModuleNotFoundError as error:
        print(error)
hvd.init()
print("rank", hvd.rank(), "of", hvd.size())
1 / 0
"""


def test_every_name_of_horovods_is_ours_and_an_error_is_the_scripts_own_traceback(tmp_path):
    ended = alone(tmp_path, NAMES, "--lr", "0.1")
    assert ended.code == 1, ended.output
    for word in ("TensorFlow", "Keras", "MXNet", "Spark", "Ray", "common.util is an inner part", "rank 0 of 1"):
        assert word in ended.output
    line = NAMES.splitlines().index("1 / 0") + 1
    frame = f'Traceback (most recent call last):\n  File "script.py", line {line}, in <module>\n'
    assert frame in ended.output
    assert "\nZeroDivisionError: division by zero" in ended.output


@pytest.mark.slow
def test_a_scripts_exit_code_is_its_own(tmp_path):
    assert alone(tmp_path, "import sys, horovod.torch as hvd\nhvd.init()\nsys.exit(7)\n").code == 7


CHILDREN = """\
import torch
from torch.utils.data import DataLoader, Dataset
import horovod
import horovod.torch as hvd


class Squares(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return i * i, hvd.__name__, hvd.allreduce.__module__.startswith("hvdtrain")


def work(factor):
    hvd.init()
    return hvd.allreduce(torch.tensor(float(hvd.rank() + 1)), op=hvd.Sum).item() * factor


if __name__ == "__main__":
    loader = DataLoader(Squares(), batch_size=4, num_workers=1, multiprocessing_context="spawn")
    print([batch.tolist() if torch.is_tensor(batch) else list(batch) for batch in next(iter(loader))])
    print(horovod.run(work, args=(10,), np=2))
"""


@pytest.mark.slow
def test_processes_that_a_script_starts_find_the_same_names(tmp_path):
    ended = alone(tmp_path, CHILDREN)
    assert ended.code == 0, ended.output
    assert "[0, 1, 4, 9]" in ended.output
    assert "[True, True, True, True]" in ended.output
    assert "[30.0, 30.0]" in ended.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a script"),
        (["gone.py"], "gone.py is no file"),
        (["--lr", "1", "script.py"], "unknown flag --lr"),
        (["--backend"], "--backend needs a name"),
        (["--backend", "torhc", "script.py"], "did you mean 'torch'"),
        (["-m", "no_such_module"], "no module named 'no_such_module'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("1 / 0\n")
    assert way_in(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_module_runs_like_a_file(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "training.py").write_text(
        "import sys\nimport horovod.torch as hvd\nhvd.init()\nprint(hvd.size(), sys.argv[1:])\n"
    )
    ended = run([str(BIN / "python"), *WAY_IN, "-m", "package.training", "a"], cwd=tmp_path)
    assert (ended.code, ended.output) == (0, "1 ['a']\n")
