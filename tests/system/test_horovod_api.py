"""Horovod's API under the real launchers: `tests/ranks_horovod` on every engine, and how jobs end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from launching import HOROVOD_MPIRUN, LOCAL, MPI, TORCH, run

RANKS = Path(__file__).resolve().parents[1] / "ranks_horovod"


@pytest.mark.parametrize(
    ("launch", "ranks"),
    [(MPI, 2), *(pytest.param(launch, n, marks=pytest.mark.slow) for launch, n in ((LOCAL, 1), (TORCH, 2), (TORCH, 3), (MPI, 3), (MPI, 4)))],
    ids=str,
)  # fmt: skip
def test_every_operation_on_every_rank(launch, ranks):
    options = ["-x", "-q", "-p", "no:cacheprovider", "--color=no"]
    said = {"HVDTRAIN_BACKEND": launch.backend, "HVDTRAIN_TIMEOUT_S": "60"}
    ended = run(launch.argv(ranks, "-m", "pytest", *options, str(RANKS)), timeout_s=240, **said)
    assert ended.code == 0, ended.output[-8000:]
    counts = re.findall(r"(\d+) passed", ended.output)
    assert len(counts) == ranks
    assert int(counts[0]) > 90


SCRIPT = """
import sys, threading, time, torch
import hvdtrain.horovod as hvd
hvd.init()
rank, size = hvd.rank(), hvd.size()
hvd.allreduce(torch.ones(1), name="before")
{then}
print("rank", rank, "done", flush=True)
"""


def job(tmp_path, then, launch, ranks=2, timeout_s="60"):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(then=then))
    own = {"HVDTRAIN_BACKEND": launch.backend, "HVDTRAIN_TIMEOUT_S": timeout_s}
    return run(launch.argv(ranks, str(file)), timeout_s=90, **own)


both = pytest.mark.parametrize("launch", [MPI, pytest.param(TORCH, marks=pytest.mark.slow)], ids=str)


@pytest.mark.slow
@both
@pytest.mark.parametrize(
    "then",
    ["", pytest.param("hvd.shutdown(); hvd.shutdown(); assert not hvd.is_initialized()", marks=pytest.mark.slow)],
)
def test_a_script_that_forgets_or_remembers_shutdown_ends_quietly(tmp_path, launch, then):
    ended = job(tmp_path, then, launch)
    assert ended.code == 0, ended.output
    assert all(f"rank {rank} done" in ended.output for rank in range(2))
    assert "Error" not in ended.output
    assert "Warning" not in ended.output.replace("FutureWarning", "")


@both
def test_a_rank_that_never_asks_is_named_within_the_timeout(tmp_path, launch):
    then = "if rank == 0: hvd.allreduce(torch.ones(3), name='loss')\nelse: time.sleep(60)"
    ended = job(tmp_path, then, launch, timeout_s="4")
    assert ended.code != 0
    assert ended.seconds < 45
    assert re.search(r"allreduce 'loss' over all 2 ranks.*rank 1", ended.output, re.S), ended.output


@pytest.mark.slow
@both
def test_ranks_that_wait_for_different_names_are_told_what_the_other_waits_for(tmp_path, launch):
    then = "hvd.allreduce(torch.ones(3), name=f'loss{rank}')"
    ended = job(tmp_path, then, launch, timeout_s="3")
    assert ended.code != 0
    assert "has waited 3 s for rank" in ended.output, ended.output
    assert re.search(r"allreduce 'loss(\d)'.*rank \d waits in allreduce 'loss(?!\1)", ended.output), ended.output


@both
def test_the_first_exception_is_what_the_user_reads(tmp_path, launch):
    then = "if rank == 1: raise KeyError('the cause')\nhvd.allreduce(torch.ones(3))"
    ended = job(tmp_path, then, launch, ranks=3)
    assert ended.code != 0
    assert "KeyError: 'the cause'" in ended.output
    of_torchrun = ended.output.count("ChildFailedError:")
    assert ended.output.count("Traceback (most recent call last)") - of_torchrun == 1, ended.output


@pytest.mark.slow
@both
def test_a_rank_that_shuts_down_fails_what_the_others_ask_for(tmp_path, launch):
    then = """
if rank == 0:
    hvd.shutdown()
else:
    try:
        hvd.allreduce(torch.ones(3), name="late")
    except hvd.HorovodInternalError as error:
        print("told:", error, flush=True)
    hvd.shutdown()
"""
    ended = job(tmp_path, then, launch)
    assert ended.code == 0, ended.output
    assert "told: allreduce 'late': rank 0 called hvd.shutdown(), or left the program, without it" in ended.output


TRAINS = """
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
for step in range({steps}):
    optimizer.zero_grad()
    model(torch.full((1, 3), rank + 1.0)).sum().backward()
    {before}
    optimizer.step()
"""


@pytest.mark.parametrize("steps", ["5 if rank else 3", "5 if rank else 0"])
@both
def test_unequal_numbers_of_steps_without_join_are_told_at_once(tmp_path, launch, steps):
    ended = job(tmp_path, TRAINS.format(steps=steps, before=""), launch)
    assert ended.code != 0
    assert ended.seconds < 45
    assert "rank 0 called hvd.shutdown(), or left the program, without it" in ended.output, ended.output


@pytest.mark.parametrize("ends", ["", "hvd.shutdown()"], ids=["the program", "shutdown"])
@both
def test_who_has_joined_is_told_at_once_that_a_rank_ends_without_it(tmp_path, launch, ends):
    then = TRAINS.format(steps="5 if rank else 3", before="") + f"\nif rank == 0: hvd.join()\nelse: pass; {ends}"
    ended = job(tmp_path, then, launch)
    assert ended.code != 0
    assert ended.seconds < 45
    assert "hvd.join(): rank 1 called hvd.shutdown(), or left the program, without it" in ended.output, ended.output


@both
def test_a_rank_that_takes_no_further_step_is_named_within_the_timeout(tmp_path, launch):
    ended = job(
        tmp_path, TRAINS.format(steps=5, before="if step == 3 and rank == 1: time.sleep(60)"), launch, timeout_s="4"
    )
    assert ended.code != 0
    assert ended.seconds < 45
    assert re.search(r"the gradients of DistributedOptimizer 0.*missing: rank 1", ended.output), ended.output


@pytest.mark.slow
@both
def test_an_optimizer_goes_on_in_the_next_job(tmp_path, launch):
    once = TRAINS.format(steps=3, before="").split("\n")
    again = "\n".join(once[4:])
    then = "\n".join(
        [*once[:4], again, "hvd.shutdown(); hvd.init()", again, "torch.save(model.state_dict(), f'{rank}.pt')"]
    )
    ended = job(tmp_path, then.replace("f'{rank}.pt'", f"f'{tmp_path}/{{rank}}.pt'"), launch)
    assert ended.code == 0, ended.output
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(states[0]["weight"], states[1]["weight"])


@pytest.mark.slow
@both
def test_it_can_be_initialised_again(tmp_path, launch):
    then = """
for _ in range(2):
    hvd.shutdown()
    part = hvd.ProcessSet([1])
    threads = [threading.Thread(target=hvd.init, kwargs={"process_sets": [part]}) for _ in range(3)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    again = hvd.ProcessSet([1])
    hvd.init(process_sets=[again])
    assert (part.size(), again.size()) == (None, 1)
    if rank == 1: hvd.barrier(process_set=again)
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == size
"""
    ended = job(tmp_path, then, launch)
    assert ended.code == 0, ended.output


@pytest.mark.slow
@both
def test_a_rank_that_joins_while_another_ends_a_process_set(tmp_path, launch):
    then = """
part = hvd.add_process_set([0])
if rank == 0:
    try:
        hvd.remove_process_set(part)
    except hvd.HorovodInternalError as error:
        print("told:", error, flush=True)
hvd.join()
"""
    ended = job(tmp_path, then, launch)
    assert ended.code == 0, ended.output
    assert "hvd.remove_process_set([0]) needs all ranks, and rank 1 called hvd.join()" in ended.output


@pytest.mark.slow
@both
def test_a_rank_that_joins_while_another_waits_for_it_in_a_process_set_is_named(tmp_path, launch):
    then = """
part = hvd.add_process_set([0, 1])
for _ in range(3):
    hvd.barrier()
if rank == 1: hvd.allreduce(torch.ones(2), name="in part", process_set=part)
else: hvd.join()
"""
    ended = job(tmp_path, then, launch, ranks=3, timeout_s="5")
    assert ended.code != 0
    assert re.search(
        r"allreduce 'in part' over the ranks \[0, 1\].*missing: rank 0 .*in hvd.join\(\)"
        r"|hvd.join\(\) over all 3 ranks.*missing: rank 1 .*in allreduce 'in part'",
        ended.output,
    ), ended.output  # whoever waits longest says it


@pytest.mark.slow
@both
def test_gradients_of_a_job_that_ended_are_not_used(tmp_path, launch):
    then = (
        TRAINS.format(steps=2, before="")
        + """
optimizer.zero_grad()
model(torch.ones(1, 3)).sum().backward()
hvd.shutdown()
hvd.init()
for refused in (optimizer.step, lambda: model(torch.ones(1, 3)).sum().backward()):
    try:
        refused()
    except RuntimeError as error:
        print("told:", error, flush=True)
optimizer.zero_grad()
model(torch.full((1, 3), rank + 1.0)).sum().backward()
optimizer.step()
assert model.weight.grad.tolist() == [[1.5] * 3]
hvd.allreduce(torch.ones(1))
"""
    )
    ended = job(tmp_path, then, launch)
    assert ended.code == 0, ended.output
    assert (
        ended.output.count("told: gradients were on their way to the other ranks when hvd.shutdown() was called") == 4
    )


@pytest.mark.slow
@both
def test_a_forked_process_is_no_rank_and_ends_without_the_others(tmp_path, launch):
    then = """
import os
child = os.fork()
if child == 0:
    assert (hvd.rank(), hvd.size()) == (rank, size)
    try:
        hvd.allreduce(torch.ones(1))
    except ValueError as error:
        print("told:", error, flush=True)
    sys.exit(0)
began = time.monotonic()
os.waitpid(child, 0)
assert time.monotonic() - began < 20
assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="after").item() == size
"""
    ended = job(tmp_path, then, launch)
    assert ended.code == 0, ended.output
    assert ended.output.count("told: hvd.allreduce: this process was forked from a rank after hvd.init()") == 2


@pytest.mark.slow
@both
def test_a_script_without_a_guard_that_spawns_is_told(tmp_path, launch):
    then = "next(iter(torch.utils.data.DataLoader([1, 2], num_workers=1, multiprocessing_context='spawn')))"
    ended = job(tmp_path, then, launch, timeout_s="20")
    assert ended.code != 0
    assert "cannot be that rank again: put the script's own work under `if __name__ == '__main__':`" in ended.output


def test_calls_before_init_and_after_shutdown():
    code = """
import torch, hvdtrain.horovod as hvd
for turn in range(2):
    for call in (hvd.rank, hvd.size, hvd.join, hvd.barrier, lambda: hvd.allreduce(torch.ones(1)), lambda: hvd.add_process_set([0]),
                 lambda: hvd.broadcast_object(1), lambda: hvd.DistributedOptimizer(torch.optim.SGD([torch.ones(1)], 0.1)), lambda: hvd.poll(1),
                 lambda: hvd.broadcast(torch.ones(1), 0), lambda: hvd.broadcast_parameters({"w": torch.ones(1)}, 0)):
        try:
            call()
        except ValueError as error:
            assert "hvd.init() has not been called" in str(error), error
        else:
            raise SystemExit(f"{call} went through")
    everybody = hvd.global_process_set
    assert (everybody.size(), everybody.rank(), everybody.included()) == (None, None, None)
    hvd.shutdown()
    hvd.init(comm=[0])
    assert (everybody.size(), everybody.rank(), everybody.included()) == (1, 0, True)
    hvd.init()
    try:
        hvd.init(process_sets=[hvd.ProcessSet([0])])
    except ValueError as error:
        assert "hvd.init() was called before, without the process set of the ranks [0]" in str(error), error
    else:
        raise SystemExit("a process set was ignored")
    assert hvd.allreduce(torch.ones(1)).item() == 1
    hvd.shutdown()
"""
    ended = run(LOCAL.argv(1, "-c", code))
    assert ended.code == 0, ended.output


@pytest.mark.slow
def test_on_horovod_itself_the_same_names_reach_the_real_one(tmp_path):
    then = """
assert hvd.allreduce(torch.ones(2), op=hvd.Sum).tolist() == [2.0, 2.0]
assert hvd.synchronize(hvd.allgather_async(torch.ones(1), name="rows")).numel() == 2
assert hvd.broadcast_object({"rank": rank}, 0) == {"rank": 0}
only = hvd.add_process_set([1])
if rank == 1: hvd.barrier(only)
try:
    hvd.allreduce(torch.ones(1 + rank), name="different")
except hvd.HorovodInternalError as error:
    assert "Mismatched" in str(error)
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
assert type(optimizer).__module__ == "horovod.torch.optimizer"
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
model(torch.ones(1, 3) * rank).sum().backward()
optimizer.step()
assert hvd.join() in (0, 1)
"""
    ended = job(tmp_path, then, HOROVOD_MPIRUN)
    assert ended.code == 0, ended.output
