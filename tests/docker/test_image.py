"""The cpu image, built for real with buildah on a base made by debootstrap, and what runs in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from building import cpu_wheels, debian, host_settings, why_no_base
from launching import ROOT

reason = why_no_base() or ("" if shutil.which("buildah") else "there is no buildah (apt install buildah)")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(reason), reason=reason), pytest.mark.timeout(3000)]


def buildah(*argv: str | Path, limit_s: float = 300) -> str:
    env = {**os.environ, "STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}
    for _ in range(3):
        ended = subprocess.run(
            ["buildah", *argv], env=env, capture_output=True, text=True, check=False, timeout=limit_s
        )
        if "sealing memfd" not in ended.stderr:  # buildah's own start, now and then: "Device or resource busy"
            break
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    return ended.stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    root = folder / "root"
    debian(root)
    base = buildah("from", "scratch").strip()
    buildah("add", "-q", base, root, "/")
    buildah("commit", "-q", base, "localhost/hvdtrain-test-base")
    buildah("rm", base)
    shutil.rmtree(root)
    arguments = ["--build-arg", "BASE_IMAGE=localhost/hvdtrain-test-base", *cpu_wheels()]
    env = {
        **os.environ,
        "ENGINE": "buildah",
        "STORAGE_DRIVER": "vfs",
        "BUILDAH_ISOLATION": "chroot",
        "REPOSITORY": "hvdtrain-test",
    }
    built = subprocess.run(
        [ROOT / "docker" / "build.sh", "cpu", *host_settings(folder), *arguments],
        env=env, capture_output=True, text=True, check=False, timeout=2400,
    )  # fmt: skip
    assert built.returncode == 0, (built.stdout + built.stderr)[-6000:]
    name = "localhost/" + built.stdout.strip().splitlines()[-1]
    container = buildah("from", "--name", "hvdtrain-test", name).strip()
    buildah("config", "--hostname", "localhost", container)
    yield name, container
    buildah("rm", container)
    buildah("rmi", name, "localhost/hvdtrain-test-base")


def inside(image, *argv: str, user: str = "1000") -> str:
    return buildah("run", "--user", user, image[1], "--", "entrypoint.sh", *argv)


@pytest.mark.parametrize(
    "launcher",
    ["horovodrun -np 2 python", "mpirun --oversubscribe -np 2 python", "torchrun --nproc-per-node 2"],
)
@pytest.mark.parametrize("user", ["1000", "4321:4321"])
def test_every_launcher_trains_inside(image, launcher, user):
    job = [*launcher.split(), "-m", "hvdtrain", "--epochs", "2", "--run-dir", f"/tmp/run-{user[:4]}-{launcher[:5]}"]
    said = inside(image, *job, user=user)
    assert re.search(r"eval accuracy +0\.9", said), said
    assert "world size 2" in said


def test_horovod_has_what_was_asked_for(image):
    assert "can be used" in inside(image, "hvdtrain", "install-horovod", "--check")
    built = inside(image, "horovodrun", "--check-build")
    assert "[X] MPI" in built
    assert "[X] Gloo" in built
    assert "[ ] NCCL" in built


def test_there_is_no_compiler_no_key_and_no_cache(image):
    look = r"""
    which gcc g++ cc c++ make nvcc
    find / -xdev \( -name 'id_rsa*' -o -name 'id_ed25519*' -o -name 'ssh_host_*' \) -not -path '/proc/*' 2>/dev/null
    ls -d /root/.cache /home/trainer/.cache /src /tmp/hvdtrain 2>/dev/null
    true
    """
    assert inside(image, "sh", "-c", look).strip() == ""


def test_a_worker_answers_with_keys_made_at_its_start(image):
    script = (
        "export HVDTRAIN_SSH=shared HVDTRAIN_SSH_KEYS=/tmp/keys HVDTRAIN_SSH_PORT=22022; "
        "entrypoint.sh sshd & sleep 3; entrypoint.sh ssh -F ~/.ssh/config localhost 'id -un; hvdtrain --version'; kill %1"
    )
    said = buildah("run", "--user", "1000", image[1], "--", "bash", "-c", script)
    assert "trainer" in said
    assert "hvdtrain 0" in said


def test_it_is_small(image):
    size = buildah("images", "--format", "{{.Size}}", image[0]).split()
    value = float(size[0]) * {"GB": 1, "MB": 1e-3}[size[1]]
    assert value < 2.5
