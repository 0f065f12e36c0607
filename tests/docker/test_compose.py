"""docker/compose.yaml on a real Docker engine, with an image that BuildKit built: two containers as two hosts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from building import cpu_wheels, debian, host_settings, why_no_base
from launching import ROOT

from hvdtrain.version import __version__

BASE = "hvdtrain-test-base:1"
TWO_HOSTS = "-H host1:1,host2:1 -np 2 python"
TORCHRUN = "torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint host1:29400 --node-rank"


def _client() -> str:
    """A docker that can use BuildKit: newer ones need the buildx plugin for it."""
    for docker in dict.fromkeys(filter(None, [shutil.which("docker"), shutil.which("docker", path="/usr/bin")])):
        said = subprocess.run([docker, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"version (\d+)", said)
        buildx = subprocess.run([docker, "buildx", "version"], capture_output=True, check=False).returncode == 0
        if version and (int(version[1]) < 23 or buildx):
            return docker
    return ""


def _answers(docker: str, **env: str) -> bool:
    return subprocess.run([docker, "info"], env={**os.environ, **env}, capture_output=True, check=False).returncode == 0


def _compose(docker: str) -> list[str]:
    """How compose is called: docker's plugin, or the program; [] if there is neither."""
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        return [docker, "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else []


def _why_not() -> str:
    if reason := why_no_base():
        return reason
    if not _client() or not (_answers(_client()) or shutil.which("dockerd")):
        return "there is no Docker engine that can use BuildKit (apt install docker.io)"
    return "" if _compose(_client()) else "there is no docker compose (apt install docker-compose)"


class Docker:
    """A client with the words that compose needs."""

    def __init__(self, host: str | None, image: str = "") -> None:
        self.docker = _client()
        self.env = {**os.environ, "HVDTRAIN_IMAGE": image, **({"DOCKER_HOST": host} if host else {})}
        self.env["PATH"] = f"{Path(self.docker).parent}:{self.env['PATH']}"
        self._compose = [*_compose(self.docker), "-p", "hvdtrain-test", "-f", str(ROOT / "docker" / "compose.yaml")]

    def run(self, *argv: str, limit_s: float = 180, good: bool = True) -> str:
        ended = subprocess.run(argv, env=self.env, capture_output=True, text=True, check=False, timeout=limit_s)
        assert not good or ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
        return ended.stdout + ended.stderr

    def compose(self, *argv: str, **more: float) -> str:
        return self.run(*self._compose, *argv, **more)

    def begin(self, *argv: str) -> subprocess.Popen[str]:
        words = [*self._compose, "exec", "-T", *argv]
        return subprocess.Popen(words, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def container(self, service: str) -> str:
        return self.compose("ps", "-q", service).strip()


# The reason is looked for when the first test begins, so that collecting tests starts no docker.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Where a Docker engine listens: this machine's own, or one that is started and ended here."""
    if reason := _why_not():
        pytest.skip(reason)
    if _answers(_client()):
        yield None
        return
    folder = tmp_path_factory.mktemp("docker")
    address = f"unix://{folder}/docker.sock"
    places = ["--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid"]
    # Its rules for packets would stay behind: builds have this machine's network, and compose a bridge of its own.
    quiet = ["--iptables=false", "--ip-forward=false", "--bridge=none"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["dockerd", "-H", address, *places, *quiet], stdout=log, stderr=log)
        try:
            end = time.monotonic() + 60
            while not _answers(_client(), DOCKER_HOST=address):
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                assert time.monotonic() < end
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def hosts(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    root = folder / "root"
    debian(root)
    volumes = host_settings(folder)[1::2]  # BuildKit mounts nothing: this base brings what it needs
    for source, target in (volume.split(":")[:2] for volume in volumes):
        place = root / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if Path(source).is_file():
            shutil.copy(source, place)
        elif sum(file.stat().st_size for file in Path(source).rglob("*")) < 2**30:
            shutil.copytree(source, place, dirs_exist_ok=True)
    docker = Docker(engine)
    archive = folder / "root.tar"
    subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True)
    docker.run(docker.docker, "import", str(archive), BASE)
    shutil.rmtree(root)
    archive.unlink()
    docker.env |= {"ENGINE": "docker", "REPOSITORY": "hvdtrain-docker-test"}
    arguments = ["--network", "host", "--build-arg", f"BASE_IMAGE={BASE}", *cpu_wheels()]
    docker.run(str(ROOT / "docker" / "build.sh"), "cpu", *arguments, limit_s=2400)
    docker = Docker(engine, f"hvdtrain-docker-test:{__version__}-cpu")
    try:
        docker.compose("up", "-d")
        end = time.monotonic() + 60
        for service in ("host1", "host2"):
            state = [docker.docker, "inspect", "--format", "{{.State.Health.Status}}", docker.container(service)]
            while docker.run(*state).strip() != "healthy":
                assert time.monotonic() < end, docker.compose("logs", service)
                time.sleep(1)
        yield docker
    finally:
        docker.compose("down", "--volumes", good=False)
        docker.run(docker.docker, "rmi", docker.env["HVDTRAIN_IMAGE"], BASE, good=False)


@pytest.mark.parametrize("launcher", ["horovodrun", "horovodrun --gloo", "mpirun"])
def test_the_first_host_starts_the_job_on_both(hosts, launcher):
    job = f"{launcher} {TWO_HOSTS} -m hvdtrain --epochs 2"
    said = hosts.compose("exec", "-T", "host1", *job.split())
    assert re.search(r"eval accuracy +0\.9", said), said
    assert "2 ranks on 2 nodes" in said


def test_torchrun_on_each_host(hosts):
    other = hosts.begin("host2", *TORCHRUN.split(), "1", "-m", "hvdtrain", "--epochs", "2")
    said = hosts.compose("exec", "-T", "host1", *TORCHRUN.split(), "0", "-m", "hvdtrain", "--epochs", "2")
    other.communicate(timeout=60)
    assert re.search(r"eval accuracy +0\.9", said), said
    assert "2 ranks on 2 nodes" in said


def test_a_killed_host_ends_the_job(hosts):
    job = hosts.begin("host1", *f"mpirun {TWO_HOSTS} -m hvdtrain --epochs 1000 --timeout 15".split())
    time.sleep(10)
    assert job.poll() is None
    hosts.run(hosts.docker, "kill", hosts.container("host2"))
    job.communicate(timeout=90)
