"""The main job over hosts that share nothing but a network: every launcher and engine, what goes over the wire, a lost host."""

from __future__ import annotations

import json
import re
import subprocess
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


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with Hosts(tmp_path_factory.mktemp("two") / "net", *NAMES[:2]) as made:
        made.slow_down("1gbit")
        yield made


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    with Hosts(tmp_path_factory.mktemp("three") / "net", *NAMES) as made:
        made.slow_down("1gbit")
        yield made


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    ended = run(LOCAL.hvdtrain(1, *FLAGS, "--run-dir", str(folder)))
    assert ended.code == 0, ended.output
    return json.loads((folder / "summary.json").read_text())


def job(
    hosts: Hosts, kind: str, backend: str, *argv: str, each: int = 1, limit_s: float = 120
) -> list[tuple[int, str]]:
    """Run a program with one rank on each host; the exit code and the output of each launcher."""
    why = unavailable(kind, backend)
    if why:
        pytest.skip(why)
    processes = [hosts.begin(name, command) for name, command in launcher(hosts, kind, *argv, each=each).items()]
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


def same_result(hosts: Hosts, reference: dict, folder: Path, kind: str, backend: str) -> None:
    ended = job(hosts, kind, backend, "-m", "hvdtrain", "--backend", backend, *FLAGS, "--run-dir", str(folder))
    assert all(code == 0 for code, _ in ended), ended
    assert f"{len(hosts.names)} ranks on {len(hosts.names)} nodes" in ended[0][1]
    many = json.loads((folder / "summary.json").read_text())
    assert (many["backend"], many["world_size"]) == (backend, len(hosts.names))
    assert abs(many["eval_loss"] - reference["eval_loss"]) < 1e-9


@pytest.mark.parametrize(("kind", "backend"), ENGINES)
def test_ranks_on_two_hosts_give_the_result_of_one_process(two, reference, tmp_path, kind, backend):
    same_result(two, reference, tmp_path, kind, backend)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "backend"), ENGINES)
def test_ranks_on_three_hosts_give_the_result_of_one_process(three, reference, tmp_path, kind, backend):
    same_result(three, reference, tmp_path, kind, backend)


def of_the_ring(hosts: Hosts, folder: Path, kind: str, backend: str, *, each: int = 1, family: str = "auto") -> list:
    """The bytes that each host sends in a step, as parts of what it would send in a ring of hosts: 2(N-1)/N times the
    gradient's bytes. No all-reduce can send less from its busiest host; headers come on top."""
    words = [str(HERE / "wire_job.py"), backend, str(folder), "--all-reduce", family]
    ended = job(hosts, kind, backend, *words, each=each)
    assert all(code == 0 for code, _ in ended), ended
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    assert len(found) == len(hosts.names) * each
    count = len(hosts.names)
    bound = 2 * (count - 1) / count * found[0]["gradient_bytes"]
    parts = [round(one["sent_per_step"] / bound, 3) for one in found if one["rank"] % each == 0]
    print(f"{backend} under {kind}, {count} hosts with {each}, {family}: {parts} of the ring's bytes")
    return parts


WIRED = [("horovodrun-gloo", "horovod"), ("horovodrun-mpi", "horovod"), ("mpirun", "mpi"), ("torchrun", "torch")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "backend"), WIRED)
def test_a_step_sends_hardly_more_than_a_ring_would_on_two_hosts(two, tmp_path, kind, backend):
    parts = of_the_ring(two, tmp_path, kind, backend)
    assert max(parts) <= 1.15
    assert min(parts) >= 0.9  # the counters are those of the wire that was used


@pytest.mark.parametrize(
    ("kind", "backend"), [pytest.param(*each, marks=() if each[1] == "mpi" else pytest.mark.slow) for each in WIRED]
)
def test_a_step_sends_hardly_more_than_a_ring_would_on_three_hosts(three, tmp_path, kind, backend):
    parts = of_the_ring(three, tmp_path, kind, backend)
    assert max(parts) <= 1.15
    assert min(parts) >= 0.9


@pytest.mark.parametrize("compression", ["none", "int8"])
@pytest.mark.parametrize(
    ("kind", "backend"), [pytest.param(*each, marks=() if each[1] == "torch" else pytest.mark.slow) for each in WIRED]
)
def test_the_bytes_that_are_counted_are_those_that_leave_the_host(two, tmp_path, kind, backend, compression):
    words = [str(HERE / "wire_job.py"), backend, str(tmp_path), "--compression", compression]
    ended = job(two, kind, backend, *words)
    assert all(code == 0 for code, _ in ended), ended
    found = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("*.json"))]
    parts = [round(one["sent_per_step"] / one["counted_per_step"], 3) for one in found]
    print(f"{backend} under {kind}, {compression}: {parts} of the bytes that were counted")
    assert max(parts) <= 1.05
    assert min(parts) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "backend"), [("mpirun", "mpi"), ("mpirun", "horovod")])
def test_the_algorithm_that_was_asked_for_is_seen_on_the_wire(three, tmp_path, kind, backend):
    # Of three ranks one has no partner in recursive doubling and halving: it gives its part to another, which sends more.
    parts = {}
    for family in ("ring", "tree", "rabenseifner"):
        (tmp_path / family).mkdir()
        parts[family] = of_the_ring(three, tmp_path / family, kind, backend, family=family)
    assert max(parts["ring"]) - min(parts["ring"]) < 0.05
    assert max(parts["tree"]) > 1.3
    assert max(parts["rabenseifner"]) > 1.3
    assert parts["tree"].index(max(parts["tree"])) != parts["rabenseifner"].index(max(parts["rabenseifner"]))


@pytest.mark.slow
def test_a_hierarchical_all_reduce_sends_once_from_each_host(two, tmp_path):
    parts = of_the_ring(two, tmp_path, "mpirun", "mpi", each=2, family="hierarchical")
    assert max(parts) <= 1.15
    assert min(parts) >= 0.9


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("mpirun", "mpi"),
        pytest.param("horovodrun-gloo", "horovod", marks=pytest.mark.slow),
        pytest.param("horovodrun-mpi", "horovod", marks=pytest.mark.slow),
        pytest.param("torchrun", "torch", marks=pytest.mark.slow),
    ],
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
        took = time.monotonic() - began
        print(f"{backend} under {kind}: all launchers had ended {took:.0f} s after the link went down")
        assert took < 60, said
        assert lost in said, said[-6000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mpirun", "horovodrun-mpi", "horovodrun-gloo"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no such host", r"nowhere"),
        ("unknown key", r"[Hh]ost key verification failed|No ED25519 host key is known"),
        ("too few slots", r"slots|Requested more processes|not enough"),
    ],
)
def test_a_launch_that_cannot_work_ends_before_training_and_says_why(tmp_path, kind, fault, says):
    why = unavailable(kind, "horovod" if kind.startswith("horovodrun") else "mpi")
    if why:
        pytest.skip(why)
    if fault == "unknown key" and kind != "mpirun":
        pytest.skip("horovodrun tells ssh to accept unknown host keys")
    with Hosts(tmp_path / "net", *NAMES[:2]) as hosts:
        (command,) = launcher(hosts, kind, "-m", "hvdtrain", "--run-dir", str(tmp_path / "run")).values()
        if fault == "no such host":
            command = [word.replace("beta:1", "nowhere:1") for word in command]
        elif fault == "unknown key":
            hosts.known_hosts.write_text("")
        else:
            command[command.index("-np") + 1] = "5"
        process = hosts.begin("alpha", command, HOROVOD_START_TIMEOUT="20")
        try:
            said, _ = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            hosts.kill_all()
            pytest.fail(f"still running: {process.communicate()[0][-4000:]}")
        print(said[-1500:])
        assert process.returncode != 0
        assert re.search(says, said), said
        assert not (tmp_path / "run" / "summary.json").exists()
