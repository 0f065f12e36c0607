"""The horovod backend where it cannot run: what the user reads, before anything is trained."""

from __future__ import annotations

import os

import pytest
from launching import HOROVOD_MPIRUN, LAUNCHERS, missing, run

pytestmark = pytest.mark.skipif(bool(missing("mpirun", "horovod")), reason=missing("mpirun", "horovod"))


def test_torchrun_is_refused_with_the_command_that_works(tmp_path):
    ended = run(LAUNCHERS["torchrun"](2, "-m", "hvdtrain", "--backend", "horovod", "--run-dir", str(tmp_path / "run")))
    assert ended.code != 0
    assert "backend 'horovod' cannot run under torchrun" in ended.output
    assert "`horovodrun -np 2 python -m hvdtrain`, or use --backend torch" in ended.output
    assert "hvdtrain/backends" not in ended.output  # no frames of ours: one line is enough
    assert not (tmp_path / "run").exists()


def test_another_programs_hvd_init_is_said(tmp_path):
    script = tmp_path / "twice.py"
    script.write_text("import horovod.torch as hvd\nhvd.init()\nimport hvdtrain\nhvdtrain.init('horovod').start()\n")
    ended = run(HOROVOD_MPIRUN.argv(2, str(script)))
    assert ended.code != 0
    assert (
        "Horovod is already initialised in this process; let hvdtrain.init() do it, and drop hvd.init()" in ended.output
    )


def test_ranks_with_different_models_are_named_and_do_not_stall(tmp_path):
    script = tmp_path / "models.py"
    script.write_text(
        "import torch, hvdtrain\n"
        "with hvdtrain.init('horovod', device='cpu', timeout_s=120) as backend:\n"
        "    model = torch.nn.Linear(4, 3 if backend.rank == 1 else 2)\n"
        "    backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))\n"
    )
    ended = run(HOROVOD_MPIRUN.argv(3, str(script)))
    assert ended.code != 0
    assert ended.seconds < 60
    assert "weight" in ended.output
    assert "rank 1" in ended.output
    assert "hvdtrain.errors." in ended.output


def test_horovodruns_own_variables_reach_horovod_and_flags_win_over_them(tmp_path):
    script = tmp_path / "variables.py"
    script.write_text(
        "import os, hvdtrain\n"
        "with hvdtrain.init('horovod', device='cpu', cycle_time_ms=7) as backend:\n"
        "    print('after', os.environ['HOROVOD_CYCLE_TIME'], os.environ['HOROVOD_FUSION_THRESHOLD'])\n"
    )
    horovodrun = LAUNCHERS["horovodrun-gloo"](2, str(script))
    at = horovodrun.index("-np")
    told = [*horovodrun[:at], "--cycle-time-ms", "9", "--fusion-threshold-mb", "3", *horovodrun[at:]]
    ended = run(told)
    assert ended.code == 0, ended.output
    assert ended.output.count(f"after 9.0 {3 * 2**20}") == 2, ended.output
    assert "HOROVOD_CYCLE_TIME" not in os.environ
