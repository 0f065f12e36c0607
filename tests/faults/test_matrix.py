"""Every fault, under every launcher, on the first and the last rank, at every moment: all end soon, and the right rank is named."""

from __future__ import annotations

import itertools
import re

import pytest
from faulty import TIMEOUT_S, end_of, names
from slurm import cluster
from slurm import missing as slurm_is_missing

ENGINES = {
    "torchrun": "torch",
    "mpirun": "mpi",
    "horovodrun-gloo": "horovod",
    "horovodrun-mpi": "horovod",
    "spawn": "torch",
}
SRUN_ENGINE = "torch"  # needs no PMIx of Slurm's
DEATHS = ("os-exit-0", "os-exit-3", "kill", "segv")
WORDS = {  # what is read of an exception, once
    "exception": "ValueError: planted",
    "memory": "MemoryError",
    "silent": r"Silent",
    "large": "ValueError: planted",
    "no-exception": "Unpicklable: planted",
    "group": "planted",
    "chain": "planted",
    "full-disk": "File too large|could not write",
}
FAULTS = (*DEATHS, "exit-0", "exit-3", "stop", *WORDS)
MOMENTS = ("before", "step", "evaluation", "saving")
SAMPLE = [  # one of each kind, each launcher, both ranks, all moments
    ("mpirun", "stop", 0, "step"),
    ("torchrun", "kill", 0, "evaluation"),
    ("horovodrun-gloo", "silent", 1, "saving"),
    ("spawn", "segv", 0, "step"),
    ("mpirun", "exit-0", 1, "before"),
]
# Rank 0 writes, so that another rank's disk may be full.
KINDS = [cell for cell in itertools.product(FAULTS, (0, 1), MOMENTS) if (cell[0], cell[1]) != ("full-disk", 1)]
# A rank that stands still before the others begin an operation may hold them inside the engine, where it has no bound.
KINDS += [("stop", culprit, "earlier") for culprit in (0, 1)]
ALL = [(launcher, *cell) for launcher in ENGINES for cell in KINDS]
CELLS = [*SAMPLE, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in ALL if cell not in SAMPLE)]
# A launcher ends all ranks at the first that ends, a store that sees a rank end tells within seconds, and ranks that never
# came are looked for; on a busy machine all of it takes longer.
DEATH_S = 30
STALL_S = TIMEOUT_S + 10 + 20


@pytest.mark.parametrize(("launcher", "fault", "culprit", "moment"), CELLS)
def test_a_fault_ends_all_and_is_named(launcher, fault, culprit, moment, tmp_path, record_property):
    outcome = end_of(launcher, ENGINES[launcher], fault, culprit, moment, tmp_path)
    record_property("seconds", round(outcome.seconds, 1))  # for --junitxml
    # Before hvdtrain has begun, Python itself prints all 20 MB, and mpirun takes its time to pass them on.
    slow = (fault, moment) == ("large", "before") and launcher in ("mpirun", "horovodrun-mpi")
    check(outcome, fault, culprit, DEATH_S + 90 * slow)


@pytest.fixture(scope="module")
def slurm():
    reason = slurm_is_missing()
    if reason:
        pytest.skip(reason)
    with cluster() as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "culprit", "moment"), KINDS)
def test_a_fault_under_srun_ends_all_and_is_named(slurm, fault, culprit, moment, tmp_path, record_property):
    outcome = end_of("srun", SRUN_ENGINE, fault, culprit, moment, tmp_path, slurm.environment)
    record_property("seconds", round(outcome.seconds, 1))
    check(outcome, fault, culprit)


def check(outcome, fault, culprit, death_s=DEATH_S):
    output = outcome.ended.output
    assert outcome.ended.code not in (0, None), output
    # One that is stopped before it came cannot be told from one that takes its time.
    assert outcome.seconds < (STALL_S if fault == "stop" else death_s), f"{outcome.seconds:.1f} s\n{output}"
    assert names(output, culprit) or fault in WORDS, output
    if fault in WORDS:
        assert re.search(WORDS[fault], output), output[:10_000]
    assert outcome.left == [], output


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ENGINES)
def test_without_a_fault_all_is_well_and_nothing_is_left(launcher, tmp_path):
    outcome = end_of(launcher, ENGINES[launcher], "none", 0, "step", tmp_path)
    assert outcome.ended.code == 0, outcome.ended.output
    assert outcome.left == []
