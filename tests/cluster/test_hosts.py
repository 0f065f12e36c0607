"""The main job over hosts that share nothing but a network: every launcher and engine, what goes over the wire, a lost host."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import Hosts, launcher, missing
from launching import LOCAL, run
from launching import missing as unavailable

HERE = Path(__file__).parent
FLAGS = ("--precision", "fp64", "--epochs", "1", "--seed", "1", "--global-batch-size", "61")
ENGINES = [
    ("horovodrun-gloo", "horovod"),
    ("horovodrun-mpi", "horovod"),
    ("mpirun", "mpi"),
    ("mpirun", "horovod"),
    ("torchrun", "torch"),
]
NAMES = ("alpha", "beta", "gamma")
reason = missing()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@pytest.fixture(scope="module", params=[2, 3])
def hosts(request, tmp_path_factory):
    with Hosts(tmp_path_factory.mktemp("hosts") / "net", *NAMES[: request.param]) as made:
        yield made


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    ended = run(LOCAL.hvdtrain(1, *FLAGS, "--run-dir", str(folder)))
    assert ended.code == 0, ended.output
    return json.loads((folder / "summary.json").read_text())


def job(hosts: Hosts, kind: str, backend: str, *argv: str, limit_s: float = 120) -> list[tuple[int, str]]:
    """Run a program with one rank on each host; the exit code and the output of each launcher."""
    why = unavailable(kind, backend)
    if why:
        pytest.skip(why)
    processes = [hosts.begin(name, command) for name, command in launcher(hosts, kind, *argv).items()]
    end = time.monotonic() + limit_s
    found = []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            hosts.kill_all()
            output, _ = process.communicate()
            pytest.fail(f"still running after {limit_s} s: {argv}\n{output[-6000:]}")
        found.append((process.returncode, output))
    return found


@pytest.mark.parametrize(("kind", "backend"), ENGINES)
def test_ranks_on_different_hosts_give_the_result_of_one_process(hosts, reference, tmp_path, kind, backend):
    ended = job(hosts, kind, backend, "-m", "hvdtrain", "--backend", backend, *FLAGS, "--run-dir", str(tmp_path))
    assert all(code == 0 for code, _ in ended), ended
    assert f"{len(hosts.names)} ranks on {len(hosts.names)} nodes" in ended[0][1]
    many = json.loads((tmp_path / "summary.json").read_text())
    assert (many["backend"], many["world_size"]) == (backend, len(hosts.names))
    assert abs(many["eval_loss"] - reference["eval_loss"]) < 1e-9


@pytest.mark.parametrize(("kind", "backend"), [("horovodrun-mpi", "horovod"), ("mpirun", "mpi"), ("torchrun", "torch")])
def test_a_step_sends_hardly_more_than_a_ring_would(hosts, tmp_path, kind, backend):
    # 2(N-1)/N times the gradient's bytes is what any all-reduce must send from the busiest host; headers come on top.
    words = [str(HERE / "wire_job.py"), backend, str(tmp_path)]
    ended = job(hosts, kind, backend, *words)
    assert all(code == 0 for code, _ in ended), ended
    found = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json"))]
    assert len(found) == len(hosts.names)
    bound = 2 * (len(found) - 1) / len(found) * found[0]["gradient_bytes"]
    ratios = [one["sent_per_step"] / bound for one in found]
    print(f"{backend} on {len(found)} hosts: {[round(ratio, 3) for ratio in ratios]} of the ring's bytes")
    assert max(ratios) <= 1.15, found
    assert min(ratios) >= 0.5, found  # the counters are those of the wire that was used


@pytest.mark.parametrize(
    ("kind", "backend"), [("horovodrun-gloo", "horovod"), ("mpirun", "mpi"), ("torchrun", "torch")]
)
def test_a_host_that_is_cut_off_ends_the_others_within_the_timeout(tmp_path, kind, backend):
    why = unavailable(kind, backend)
    if why:
        pytest.skip(why)
    lost = NAMES[2]
    with Hosts(tmp_path / "net", *NAMES) as hosts:
        log = tmp_path / "run" / "metrics.jsonl"
        flags = ["--timeout", "10", "--max-steps", "100000", "--epochs", "10000", "--log-every", "1"]
        argv = ["-m", "hvdtrain", "--backend", backend, *flags, "--run-dir", str(tmp_path / "run")]
        processes = {name: hosts.begin(name, command) for name, command in launcher(hosts, kind, *argv).items()}
        end = time.monotonic() + 90
        while not (log.exists() and log.read_text().count("\n") > 20):
            assert time.monotonic() < end, {name: process.poll() for name, process in processes.items()}
            time.sleep(0.2)
        hosts.cut_off(lost)
        began = time.monotonic()
        said = ""
        for name, process in processes.items():
            if name == lost:
                continue
            output, _ = process.communicate(timeout=90)
            said += output
            assert process.returncode != 0, output
        assert time.monotonic() - began < 60, said
        assert lost in said, said[-6000:]


def test_the_programs_of_the_tests_run_here():
    assert run([sys.executable, str(HERE / "wire_job.py"), "--help"]).code == 0
