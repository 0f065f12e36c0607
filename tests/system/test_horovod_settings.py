"""Each of Horovod's settings does what it says: seen in Horovod's own trace, in numbers and in seconds."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from launching import HOROVOD_GLOO, HOROVOD_MPIRUN, run

JOB = str(Path(__file__).with_name("horovod_job.py"))


def job(launch=HOROVOD_MPIRUN, *, late_s=0, steps=20, **options):
    ended = run(launch.argv(2, JOB, json.dumps(options), str(late_s), str(steps)))
    found = re.search(r"\{.*\}", ended.output)
    return ended, json.loads(found[0]) if found else None


def trace(file: Path) -> Counter:
    """How often each event occurs in a timeline (which Horovod leaves without its closing bracket)."""
    text = file.read_text().rstrip().rstrip(",")
    events = json.loads(text if text.endswith("]") else text + "]")
    names = Counter(event["name"] for event in events if "name" in event)
    names.update(event["args"].get("name", "") for event in events if event.get("name") == "process_name")
    return names


def test_the_timeline_shows_fusion_cache_and_groups_as_they_were_set(tmp_path):
    each = {"num_groups": 0, "timeline": str(tmp_path / "each"), "cache_capacity": 0, "fusion_threshold_mb": 0}
    ended, _ = job(**each)
    assert ended.code == 0, ended.output
    each_by_itself = trace(tmp_path / "each")
    fused = {"num_groups": 0, "timeline": str(tmp_path / "fused"), "fusion_threshold_mb": 8, "cycle_time_ms": 20}
    ended, _ = job(**fused)
    assert ended.code == 0, ended.output
    fused_by_horovod = trace(tmp_path / "fused")
    # Without a fusion buffer nothing is copied into one; with one, a slow cycle finds both gradients together.
    assert each_by_itself["MEMCPY_IN_FUSION_BUFFER"] == 0
    assert fused_by_horovod["MEMCPY_IN_FUSION_BUFFER"] >= 20
    assert {"allreduce.gradient.pack.0", "allreduce.gradient.pack.1"} <= set(each_by_itself)
    # "0" and "1": a rank said that a tensor is ready, which the cache makes unnecessary from the second step on.
    assert each_by_itself["0"] > 40
    assert fused_by_horovod["0"] < 30


def test_packs_are_our_own_by_default_and_horovod_copies_nothing(tmp_path):
    ended, _ = job(timeline=str(tmp_path / "trace"))
    assert ended.code == 0, ended.output
    seen = trace(tmp_path / "trace")
    assert "allreduce.gradient.pack.0" in seen
    assert "allreduce.gradient.pack.1" not in seen
    assert seen["MEMCPY_IN_FUSION_BUFFER"] == 0


def test_grouped_all_reduces_and_cycles(tmp_path):
    ended, found = job(num_groups=1, cycle_time_ms=150, timeline=str(tmp_path / "t"), timeline_mark_cycles=True)
    assert ended.code == 0, ended.output
    seen = trace(tmp_path / "t")
    assert {"grouped_allreduce.gradient.pack.0_1of2", "grouped_allreduce.gradient.pack.0_2of2"} <= set(seen)
    assert seen["CYCLE_START"] > 5
    assert found["seconds"] > 5 * 0.15 / 2  # five all-reduces, each of which waits for its cycle
    ended, found = job(HOROVOD_GLOO, cycle_time_ms=150)
    assert ended.code == 0, ended.output
    assert found["seconds"] > 5 * 0.15 / 2


@pytest.mark.slow
def test_autotune_tries_settings_and_logs_them(tmp_path):
    log = tmp_path / "autotune.csv"
    ended, _ = job(steps=1500, num_groups=0, autotune=True, autotune_log=str(log))
    assert ended.code == 0, ended.output
    rows = list(csv.DictReader(log.read_text().splitlines()))
    assert len({row["tensor_fusion_threshold"] for row in rows}) > 1


@pytest.mark.slow
def test_horovods_own_stall_check_warns_and_ends_when_it_is_told_to():
    ended, found = job(late_s=4, stall_check_s=1)
    assert ended.code == 0, ended.output
    assert "stall" in ended.output.lower()
    assert not found["error"]
    ended, found = job(late_s=12, stall_check_s=1, stall_shutdown_s=3)
    assert "shut down" in found["error"], ended.output
    assert found["seconds"] < 11
    ended, _ = job(late_s=4, stall_check_s=0)
    assert ended.code == 0, ended.output
    assert "stall" not in ended.output.lower()


THIRD = (1 / 3 + 1 / 3) / 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, [0.5, 0.5, THIRD, 0.0], marks=pytest.mark.slow),
        pytest.param(
            {"compression": "fp16"}, [0.5, 0.5, 2 * float(torch.tensor(THIRD / 2).half()), 0.0], marks=pytest.mark.slow
        ),
        pytest.param(
            {"compression": "bf16"},
            [0.5, 0.5, 2 * float(torch.tensor(THIRD / 2).bfloat16()), 0.0],
            marks=pytest.mark.slow,
        ),
        # Dividing by a tiny factor first leaves the range of a half: infinity, and nothing else, can come back.
        ({"compression": "fp16", "gradient_predivide_factor": 2.0**-20}, [float("inf")] * 3 + [0.0]),
        pytest.param({"gradient_predivide_factor": 2.0**-20}, [0.5, 0.5, THIRD, 0.0], marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("launch", [HOROVOD_MPIRUN, pytest.param(HOROVOD_GLOO, marks=pytest.mark.slow)], ids=str)
def test_compression_and_predivide_factor_change_the_numbers_as_they_must(launch, options, expected):
    ended, found = job(launch, steps=2, **options)
    assert ended.code == 0, ended.output
    gradient = found["gradient"]
    assert [abs(a - b) < 1e-7 or a == b for a, b in zip(gradient[:3], expected, strict=False)] == [True] * 3, gradient


def test_adasum_adds_what_is_orthogonal_and_averages_what_is_parallel():
    ended, found = job(op="adasum", steps=2)
    assert ended.code == 0, ended.output
    # Adasum(a, b) = (1 - ab / 2aa) a + (1 - ab / 2bb) b (Maleki et al. 2020, equation 3), tensor by tensor.
    a, b = torch.tensor([1.0, 0, 1 / 3, 0]), torch.tensor([0, 1.0, 1 / 3, 0])
    expected = (1 - a @ b / (2 * a @ a)) * a + (1 - a @ b / (2 * b @ b)) * b
    torch.testing.assert_close(torch.tensor(found["gradient"]), expected)


def test_adasum_combines_no_gradient_of_a_rank_where_nothing_counts():
    ended, found = job(op="adasum", steps=2, weightless=True)
    assert ended.code != 0
    assert found is None
    assert "some rank has no sample in this step, or none with a weight" in ended.output


def test_settings_that_cannot_work_are_refused_before_the_start(tmp_path):
    command = HOROVOD_MPIRUN.hvdtrain(3, "--horovod.op", "adasum", "--run-dir", str(tmp_path))
    ended = run(command)
    assert ended.code != 0
    assert "power of two" in ended.output
    ended = run(HOROVOD_MPIRUN.hvdtrain(1, "--horovod.hierarchical-allreduce", "--run-dir", str(tmp_path)))
    if ended.code:  # a Horovod with NCCL has it
        assert "NCCL" in ended.output
    assert not list(tmp_path.glob("*")) or ended.code == 0
