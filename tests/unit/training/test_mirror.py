"""Checkpoints in a second place: whole there or none, brought back where the first is lost, and never mixed."""

from __future__ import annotations

import shutil
import sys
import uuid

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import nn

from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.settings.config import TrainConfig
from hvdtrain.training.async_checkpoints import AsyncCheckpoints
from hvdtrain.training.checkpoint import Checkpoints, load
from hvdtrain.training.checkpoint_files import FILES, MANIFEST
from hvdtrain.training.mirror import Mirror


class Dying(LocalFileSystem):
    """A file system whose connection ends after so many files, half way into the next."""

    protocol = "dying"
    left = 10**6
    order: list[str] = []  # noqa: RUF012

    def put_file(self, lpath, rpath, **options):
        Dying.order.append(rpath.rpartition("/")[2])
        if Dying.left == 0:
            with open(lpath, "rb") as half, open(rpath, "wb") as there:
                there.write(half.read()[:-9])
            raise ConnectionError("the line is dead")
        Dying.left -= 1
        super().put_file(lpath, rpath, **options)


fsspec.register_implementation("dying", Dying, clobber=True)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    return f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else f"file://{tmp_path}/there/run"


def model(step):
    torch.manual_seed(step)
    return nn.Linear(3, 3)


def save(checkpoints, backend, step):
    return checkpoints.save(
        backend, step=step, model=model(step).state_dict(), training={"x": step}, rank_state={"r": step}
    )


def restored(checkpoints, backend):
    found = checkpoints.find(backend)
    if found is None:
        return None
    read = nn.Linear(3, 3)
    loaded = load(backend, found, read)
    assert torch.equal(read.weight, model(found.step).weight)
    assert loaded.training == {"x": found.step}
    return found.step


@pytest.mark.parametrize("kind", [Checkpoints, AsyncCheckpoints])
def test_the_newest_are_kept_there_and_brought_back_bit_for_bit(tmp_path, alone, url, kind):
    checkpoints = kind(tmp_path / "run", 2, mirror=Mirror(url))
    assert restored(checkpoints, alone) is None
    for step in (1, 2, 3, 3):
        save(checkpoints, alone, step)
    checkpoints.settle(alone)
    assert Mirror(url).steps() == [2, 3]
    checkpoints.release()
    shutil.rmtree(tmp_path / "run")
    again = kind(tmp_path / "run", 2, mirror=Mirror(url))
    assert restored(again, alone) == 3
    save(again, alone, 4)
    again.settle(alone)
    assert Mirror(url).steps() == [3, 4]
    again.release()


def test_without_a_loss_the_folders_own_are_taken(tmp_path, alone, url):
    checkpoints = Checkpoints(tmp_path / "run", mirror=Mirror(url))
    save(checkpoints, alone, 1)
    other = Checkpoints(tmp_path / "run")
    checkpoints.release()
    save(other, alone, 2)  # without a second place
    other.release()
    before = (tmp_path / "run" / "step-00000002" / MANIFEST).stat().st_mtime_ns
    assert restored(Checkpoints(tmp_path / "run", mirror=Mirror(url)), alone) == 2
    assert (tmp_path / "run" / "step-00000002" / MANIFEST).stat().st_mtime_ns == before


def few(cases, cheap):
    return [case if case in cheap else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("after", few(range(len(FILES) + 1), [0, len(FILES)]))
def test_a_copy_that_broke_off_anywhere_is_no_checkpoint(tmp_path, alone, caplog, after):
    url = f"dying://{tmp_path}/there"
    checkpoints = Checkpoints(tmp_path / "run", mirror=Mirror(url))
    Dying.left, Dying.order = 10**6, []
    save(checkpoints, alone, 1)
    assert Dying.order == [*FILES, MANIFEST]
    Dying.left = after
    with pytest.raises(CheckpointError, match=r"could not copy .*the line is dead"):
        save(checkpoints, alone, 2)
    assert [path.name for path in (tmp_path / "run").glob("step-*2")] == ["step-00000002"]  # here it is whole
    checkpoints.release()
    assert restored(Checkpoints(tmp_path / "empty", mirror=Mirror(url)), alone) == 1
    Dying.left = 10**6
    again = Checkpoints(tmp_path / "run", mirror=Mirror(url))
    save(again, alone, 2)
    assert Mirror(url).steps() == [1, 2]
    again.release()


@pytest.mark.parametrize("file", few([*FILES, MANIFEST], ["model.safetensors", MANIFEST]))
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_copy_is_passed_over(tmp_path, alone, caplog, file, damage):
    there = tmp_path / "there"
    checkpoints = Checkpoints(tmp_path / "run", mirror=Mirror(f"file://{there}"))
    for step in (1, 2):
        save(checkpoints, alone, step)
    checkpoints.release()
    victim = there / "step-00000002" / file
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-3])
    else:
        victim.unlink()
    assert restored(Checkpoints(tmp_path / "empty", mirror=Mirror(f"file://{there}")), alone) == 1
    assert list((tmp_path / "empty").glob("partial-*")) == []


def test_a_damaged_one_here_is_replaced_by_the_whole_one_there(tmp_path, alone, url):
    checkpoints = Checkpoints(tmp_path / "run", mirror=Mirror(url))
    for step in (1, 2):
        save(checkpoints, alone, step)
    checkpoints.release()
    (tmp_path / "run" / "step-00000002" / "training.json").write_text("{}")
    assert restored(Checkpoints(tmp_path / "run", mirror=Mirror(url)), alone) == 2


def test_another_line_there_is_refused(tmp_path, alone, url):
    first = Checkpoints(tmp_path / "run", mirror=Mirror(url))
    old = save(first, alone, 1)
    save(first, alone, 2)
    found = first.find(alone, old)
    with pytest.raises(CheckpointError, match="step 2, and this run begins anew"):
        Checkpoints(tmp_path / "other", mirror=Mirror(url)).begin(None)
    with pytest.raises(CheckpointError, match="step 2, and this run goes on from step 1"):
        first.begin(found)
    assert Mirror(url).steps() == [1, 2]
    assert first.begin(first.latest()) == ""
    first.release()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://x/y", "of no kind that fsspec knows"),
        ("oci://bucket@place/run", "needs another package: .*ocifs"),
        ("file:///proc/nowhere", "could not copy"),
    ],
)
def test_a_place_that_cannot_be_is_told(tmp_path, alone, url, message):
    with pytest.raises(CheckpointError, match=message):
        save(Checkpoints(tmp_path, mirror=Mirror(url)), alone, 1)


def test_without_fsspec_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)  # as where it is not installed
    with pytest.raises(CheckpointError, match=r"--checkpoint-url s3://bucket/run needs fsspec .*pip install fsspec"):
        Mirror("s3://bucket/run").steps()


@pytest.mark.parametrize("url", ["runs/here", "/tmp/x", "s3:bucket", "://x"])
def test_a_folder_is_no_url(url):
    with pytest.raises(ConfigError, match=r"--checkpoint-url .* is no URL"):
        TrainConfig(checkpoint_url=url)


@pytest.mark.parametrize(
    "url", ["ftp://me:secret@host/run", "sftp://a.b:c-secret@h:22/x", "webdav+https://:secret@h/x"]
)
def test_a_password_does_not_come_into_the_run_folder(url):
    with pytest.raises(ConfigError, match=r"--checkpoint-url \S+//\.\.\.@\S+ holds a password") as refused:
        TrainConfig(checkpoint_url=url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["s3://bucket/run@2", "sftp://me@host:22/x", "file:///a:b@c/d"])
def test_an_at_sign_is_no_password(url):
    assert TrainConfig(checkpoint_url=url).checkpoint_url == url
