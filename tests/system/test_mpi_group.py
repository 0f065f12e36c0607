"""The mpi4py process group on its own: `tests/ranks` under mpirun, and plain torch scripts."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from launching import LAUNCHERS, MPI, missing, run

RANKS = Path(__file__).resolve().parents[1] / "ranks"


@pytest.mark.parametrize("ranks", [3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 4))])
def test_every_operation_on_every_rank(ranks):
    options = ["-x", "-q", "-p", "no:cacheprovider", "--color=no"]
    apart = [word for name in ("test_sharding.py", "test_interrupted.py") for word in ("--ignore", str(RANKS / name))]
    ended = run(MPI.argv(ranks, "-m", "pytest", *options, *apart, str(RANKS)), timeout_s=240)
    assert ended.code == 0, ended.output[-8000:]
    counts = re.findall(r"(\d+) passed", ended.output)
    assert len(counts) == ranks
    assert len(set(counts)) == 1
    assert int(counts[0]) > 300


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 looks for signals at other points")
@pytest.mark.parametrize("ranks", [1, 2])
def test_calls_that_are_interrupted_anywhere(ranks):
    options = ["-x", "-q", "-p", "no:cacheprovider", "--color=no", "--show-capture=no"]
    ended = run(MPI.argv(ranks, "-m", "pytest", *options, str(RANKS / "test_interrupted.py")), timeout_s=280)
    assert ended.code == 0, ended.output[-8000:]
    assert len(re.findall(r"4 passed", ended.output)) == ranks


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (3, 4))])
def test_tensors_and_models_that_are_cut_over_the_ranks(ranks):
    options = ["-x", "-q", "-p", "no:cacheprovider", "--color=no"]
    ended = run(MPI.argv(ranks, "-m", "pytest", *options, str(RANKS / "test_sharding.py")), timeout_s=240)
    assert ended.code == 0, ended.output[-8000:]
    assert len(re.findall(r"72 passed", ended.output)) == ranks


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_plain_torch_script_with_ddp_powersgd_join_and_checkpoints(tmp_path, ranks):
    script = str(Path(__file__).with_name("mpi_script.py"))
    ended = run(MPI.argv(ranks, script, str(tmp_path / "checkpoint")))
    assert ended.code == 0, ended.output
    for rank in range(ranks):
        assert f"rank {rank} of {ranks} done" in ended.output
    assert "ABORT" not in ended.output
    assert "Warning" not in ended.output


SCRIPT = """
import os, sys, time, torch, torch.distributed as dist
{before}
import hvdtrain.mpi
dist.init_process_group("mpi4py")
rank = dist.get_rank()
dist.all_reduce(torch.ones(2))
{then}
print("rank", rank, "done", flush=True)
"""


def script(tmp_path, then="", before=""):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(then=then, before=before))
    return str(file)


@pytest.mark.parametrize("before", ["", pytest.param("from mpi4py import MPI", marks=pytest.mark.slow)])
@pytest.mark.parametrize("then", ["dist.destroy_process_group()", ""])
def test_it_comes_up_without_an_address_and_ends_without_a_word(tmp_path, before, then):
    ended = run(MPI.argv(3, script(tmp_path, then, before)))
    assert ended.code == 0, ended.output
    assert sorted(ended.output.split("\n")) == ["", *(f"rank {rank} done" for rank in range(3))]


def test_an_exception_ends_all_ranks_with_one_traceback(tmp_path):
    then = "if rank == 1: raise ValueError('planted')\ndist.all_reduce(torch.ones(3))"
    ended = run(MPI.argv(3, script(tmp_path, then)))
    assert ended.code != 0
    assert ended.seconds < 60
    assert ended.output.count("ValueError: planted") == 1
    assert ended.output.count("Traceback") == 1


def test_a_rank_that_leaves_early_is_named_within_seconds(tmp_path):
    then = "if rank == 1: sys.exit(0)\ndist.all_reduce(torch.ones(3))"
    ended = run(MPI.argv(3, script(tmp_path, then)))
    assert ended.code != 0
    assert ended.seconds < 60
    assert "rank 1 on" in ended.output
    assert "has left the program" in ended.output


def test_a_killed_rank_ends_all(tmp_path):
    ended = run(MPI.argv(3, script(tmp_path, "if rank == 1: os.kill(os.getpid(), 9)\ndist.all_reduce(torch.ones(3))")))
    assert ended.code != 0
    assert ended.seconds < 60


def test_mpi_without_threads_is_refused_with_the_reason(tmp_path):
    before = "import mpi4py\nmpi4py.rc.threads = False\nfrom mpi4py import MPI"
    ended = run(MPI.argv(2, script(tmp_path, before=before)))
    assert ended.code != 0
    assert "MPI runs with MPI_THREAD_SINGLE" in ended.output
    assert "drop mpi4py.rc settings of threads" in ended.output


def test_torchrun_is_refused_with_the_command_that_works(tmp_path):
    ended = run(LAUNCHERS["torchrun"](2, script(tmp_path)))
    assert ended.code != 0
    assert "torchrun starts processes that MPI does not join; start it with `mpirun -np 2 python ...`" in ended.output


def test_the_backend_refuses_launchers_that_mpi_does_not_join(tmp_path):
    for launcher, words in (("torchrun", "mpirun -np 2 python"), ("horovodrun-gloo", "horovodrun --mpi -np 2")):
        if missing(launcher, "mpi"):
            continue
        ended = run(LAUNCHERS[launcher](2, "-m", "hvdtrain", "--backend", "mpi", "--run-dir", str(tmp_path / "run")))
        assert ended.code != 0
        assert words in ended.output
        assert not (tmp_path / "run").exists()


def test_the_mpirun_of_another_mpi_is_explained(tmp_path):
    hydra = shutil.which("mpirun.mpich") or shutil.which("mpiexec.hydra")
    if hydra is None:
        pytest.skip("needs MPICH's mpirun beside the Open MPI that mpi4py uses")
    ended = run(
        [hydra, "-np", "2", sys.executable, "-m", "hvdtrain", "--backend", "mpi", "--run-dir", str(tmp_path / "run")]
    )
    if ended.code == 0:
        pytest.skip("mpi4py uses MPICH here")
    assert "rank 0 of 2" in ended.output
    assert (
        "Every rank is a world of its own, because mpirun belongs to another MPI than mpi4py, which uses Open MPI"
        in ended.output
    )
    assert not (tmp_path / "run").exists()


LARGE = """
size = dist.get_world_size()
count = 2**31 + 24
whole = torch.full((count,), rank + 1, dtype=torch.uint8)
dist.all_reduce(whole)
assert whole[0] == whole[-1] == whole[2**31] == sum(range(1, size + 1))
whole.fill_(rank + 5)
dist.broadcast(whole, 1)
assert whole[0] == whole[-1] == 6
del whole
part = torch.full((2**30 + 8,), rank + 3, dtype=torch.uint8)
everyone = torch.empty(size * len(part), dtype=torch.uint8)
dist.all_gather_into_tensor(everyone, part)
assert [int(one[-1]) for one in everyone.chunk(size)] == [other + 3 for other in range(size)]
out = torch.empty(len(part), dtype=torch.uint8)
dist.reduce_scatter_tensor(out, everyone)
assert int(out[0]) == int(out[-1]) == size * (rank + 3)
exchanged = torch.empty_like(everyone)
everyone.chunk(size)[1 - rank].fill_(40 + rank)
dist.all_to_all_single(exchanged, everyone)
assert int(exchanged.chunk(size)[1 - rank][-1]) == 41 - rank
del out, everyone, exchanged
large = torch.full((2**31 + 24,), rank, dtype=torch.uint8)
dist.send(large, 1) if rank == 0 else dist.recv(large, 0)
assert int(large[-1]) == 0
"""


@pytest.mark.slow
def test_tensors_of_more_than_two_to_the_31_bytes(tmp_path):
    if float(Path("/proc/meminfo").read_text().split()[7]) / 2**20 < 20:
        pytest.skip("less than 20 GB of memory are free")
    ended = run(MPI.argv(2, script(tmp_path, LARGE)), timeout_s=300)
    assert ended.code == 0, ended.output
    assert ended.output.count("done") == 2
