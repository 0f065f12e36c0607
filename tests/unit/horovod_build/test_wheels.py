"""Finished wheels are kept whole, found again, and never used when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from hvdtrain.backends.hvd.stamp import FILE, Stamp
from hvdtrain.horovod_build import wheels
from hvdtrain.horovod_build.failure import BuildError

STAMP = Stamp(
    horovod="0.28.1", torch="2.13.0", python=".cpython-311-x86_64-linux-gnu.so", cxx_standard=20, compiler="g++ 12",
    mpi=None, mpirun=None, libmpi=None, gloo=True, nccl=None, cuda=None, cuda_arch=(), edits=("a",), source="PyPI",
    key="0123456789abcdef", hvdtrain="0.1.0",
)  # fmt: skip
NAME = "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"


def built(folder: Path, stamp: Stamp | None = STAMP, extension: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / NAME, "w") as file:
        file.writestr("horovod/__init__.py", "")
        if extension:
            file.writestr(f"horovod/torch/mpi_lib_v2{STAMP.python}", os.urandom(50_000))
        if stamp:
            file.writestr(f"horovod/{FILE}", stamp.text())
    return folder / NAME


@pytest.fixture
def kept(tmp_path) -> Path:
    return wheels.keep(built(tmp_path / "built"), tmp_path / "wheels", STAMP)


def test_a_kept_wheel_is_found_again(tmp_path, kept):
    assert wheels.find(tmp_path / "wheels", STAMP) == (kept, "")
    assert kept.name == "horovod-0.28.1-1_0123456789abcdef-cp311-cp311-linux_x86_64.whl"


def test_nothing_half_written_stays(tmp_path, kept):
    assert sorted(file.name for file in (tmp_path / "wheels").iterdir()) == [kept.name, kept.name + ".sha256"]


def test_another_plans_wheel_is_not_taken(tmp_path, kept):
    assert wheels.find(tmp_path / "wheels", replace(STAMP, key="f" * 16)) == (None, "")


def test_an_empty_folder_holds_nothing(tmp_path):
    assert wheels.find(tmp_path / "none", STAMP) == (None, "")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda wheel: wheel.write_bytes(wheel.read_bytes()[:-1000]), "its checksum is wrong"),
        (lambda wheel: wheel.write_bytes(b""), "its checksum is wrong"),
        (lambda wheel: wheel.with_name(wheel.name + ".sha256").unlink(), "its checksum is missing"),
        (lambda wheel: wheel.with_name(wheel.name + ".sha256").write_text(""), "its checksum is missing"),
    ],
)
def test_a_damaged_wheel_is_not_taken_and_it_is_said(tmp_path, kept, damage, message):
    damage(kept)
    wheel, problem = wheels.find(tmp_path / "wheels", STAMP)
    assert wheel is None
    assert str(kept) in problem
    assert message in problem


def test_a_single_changed_byte_is_noticed(tmp_path, kept):
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(bytes(content))
    assert "its checksum is wrong" in wheels.find(tmp_path / "wheels", STAMP)[1]


def test_a_damaged_wheel_is_replaced_by_the_next_one(tmp_path, kept):
    kept.write_bytes(b"broken")
    assert wheels.keep(built(tmp_path / "again"), tmp_path / "wheels", STAMP) == kept
    assert wheels.find(tmp_path / "wheels", STAMP) == (kept, "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"extension": False}, "mpi_lib_v2.cpython-311-x86_64-linux-gnu.so is missing"),
        ({"stamp": None}, "its stamp is missing"),
        ({"stamp": replace(STAMP, key="other")}, "another plan's"),
    ],
)
def test_a_build_without_what_was_planned_is_not_kept(tmp_path, content, message):
    with pytest.raises(BuildError, match=message):
        wheels.keep(built(tmp_path / "built", **content), tmp_path / "wheels", STAMP)
    assert not list((tmp_path / "wheels").glob("*.whl"))


def test_a_folder_that_cannot_be_made_names_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="--wheel-dir"):
        wheels.keep(built(tmp_path / "built"), tmp_path / "file" / "wheels", STAMP)
    with (
        pytest.raises(BuildError, match="--wheel-dir"),
        wheels.locked(tmp_path / "file" / "wheels", "key", waiting=lambda: None),
    ):
        pass


HOLD = """
import sys, time; from pathlib import Path; from hvdtrain.horovod_build import wheels
with wheels.locked(Path(sys.argv[1]), "key", waiting=lambda: None):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_of_two_waits_for_the_first(tmp_path):
    process = holder(tmp_path, 1.5)
    waited = []
    began = time.monotonic()
    with wheels.locked(tmp_path, "key", waiting=lambda: waited.append(1), limit_s=30):
        assert time.monotonic() - began > 0.5
        assert process.wait(timeout=10) == 0
    assert waited == [1]
    process.stdout.close()


def test_builds_of_different_wheels_do_not_wait(tmp_path):
    process = holder(tmp_path, 30)
    with wheels.locked(tmp_path, "another key", waiting=lambda: pytest.fail("it waited"), limit_s=30):
        pass
    process.kill()
    process.wait(timeout=10)
    process.stdout.close()


def test_a_lock_that_stays_ends_in_an_error_and_one_of_a_dead_process_does_not(tmp_path):
    process = holder(tmp_path, 30)
    with (
        pytest.raises(BuildError, match=r"another build holds .*\.key\.lock"),
        wheels.locked(tmp_path, "key", waiting=lambda: None, limit_s=0.5),
    ):
        pass
    process.kill()
    process.wait(timeout=10)
    process.stdout.close()
    with wheels.locked(tmp_path, "key", waiting=lambda: None, limit_s=5):
        pass


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HVDTRAIN_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/hvdtrain")),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache/hvdtrain"),
        ({}, Path.home() / ".cache/hvdtrain"),
    ],
)
def test_the_cache_is_where_the_variables_say(environment, expected):
    assert wheels.cache(environment) == expected
    assert wheels.folder(None, environment) == expected / "wheels"


def test_wheel_dir_goes_before_the_cache(tmp_path):
    assert wheels.folder(str(tmp_path), {"HVDTRAIN_CACHE": "/a"}) == tmp_path
