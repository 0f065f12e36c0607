"""``hvdtrain verify`` finds what was planted in a task, and nothing in one that is sound."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launching import missing, run

HERE = Path(__file__).parent


def verified(task: str, *flags: str):
    return run(
        [sys.executable, "-m", "hvdtrain", "verify", "--task", f"planted_tasks.{task}", *flags], timeout_s=500, cwd=HERE
    )


PLANTED = {
    "SumOverRanks": ("torch (torchrun, 2 ranks): step 1, gradients", "2 times", "summed over the ranks"),
    "RankedStart": ("before training", "rank 1 makes another layers.0.weight", "depends on the rank"),
    "Unseeded": ("one process, twice: step 1, data", "different samples", "no seed governs"),
    "OwnBuffer": ("step 1, buffers", "mean of rank 1", "average it over the ranks"),
    "AlikeDropout": ("step 1, loss", "random numbers of all ranks are the same", "torch.manual_seed"),
    "InPlace": ("step 1, data", "changes batch[0][0] in place", "x = x * 2"),
    "SumOverSamples": ("step 1, gradients", "0.5 times", "return a mean"),
    "OwnNorm": ("step 1, gradients", "not one process's", "--sync-batch-norm"),
    "AcrossSamples": ("step 1, gradients", "not one process's", "which samples are together"),
}
SAMPLE = "SumOverRanks"


@pytest.mark.parametrize(
    "task", [SAMPLE, *(pytest.param(name, marks=pytest.mark.slow) for name in PLANTED if name != SAMPLE)]
)
def test_what_was_planted_is_named_with_its_cause(task):
    ended = verified(task, "--engines", "torch")
    assert ended.code == 1, ended.output
    for said in PLANTED[task]:
        assert said in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--ranks", "3", "--accumulate", "2", "--optimizer", "AdamW"]], ids=" ".join)
def test_a_sound_task_is_alike_on_every_engine(flags):
    ended = verified("Sound", *flags)
    assert ended.code == 0, ended.output
    for backend, launcher in (("torch", "torchrun"), ("mpi", "mpirun"), ("horovod", "horovodrun-gloo")):
        if not missing(launcher, backend):
            assert f"\n{backend} (" in f"\n{ended.output}"
    assert "differ" not in ended.output


@pytest.mark.slow
def test_random_numbers_of_a_sound_task_are_no_fault():
    ended = verified("Augmented", "--engines", "torch", "--workers", "1")
    assert ended.code == 0, ended.output
    assert "draws random numbers" in ended.output


@pytest.mark.slow
def test_synchronised_statistics_are_those_of_one_process():
    ended = verified("OwnNorm", "--engines", "torch", "--sync-batch-norm")
    assert ended.code == 0, ended.output


@pytest.mark.slow
def test_a_task_that_fails_is_said_to():
    ended = verified("Failing", "--engines", "torch")
    assert ended.code == 1
    assert "fails in one process already: ValueError: planted in the task" in ended.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "verify needs --task"),
        (["--task", "x.Y", "--ranks", "none"], "--ranks must be a whole number, got 'none'"),
        (["--task", "x.Y", "--engines", "nccl"], "--engines nccl: those that are here are torch"),
        (["--task", "x.Y", "--ranks"], "--ranks needs a value"),
        (["--task", "x.Y", "--lrr", "1"], "lrr"),
        (["--task", "x.Y", "--compression", "int8"], "what --compression and --sync change on purpose; leave them out"),
    ],
)
def test_wrong_words_are_refused_before_anything_runs(words, said):
    ended = run([sys.executable, "-m", "hvdtrain", "verify", *words], timeout_s=120)
    assert ended.code == 2
    assert said in ended.output
