"""Whatever happens to a checkpoint's files: an error that names one of them, and the checkpoint before is taken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import traceback
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hvdtrain.errors import CheckpointError
from hvdtrain.training.checkpoint import Checkpoints, load
from hvdtrain.training.checkpoint_files import FILES, MANIFEST, _digest, check, name_of, step_of
from hvdtrain.training.loop_state import LoopState
from hvdtrain.training.plain_file import to_json

ALL = (*FILES, MANIFEST)
SLOW = pytest.param(2000, marks=pytest.mark.slow)


def model():
    one = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    one[1].weight = one[0].weight
    return one


def optimizer(module):
    return torch.optim.AdamW(module.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two checkpoints of one run."""
    from hvdtrain.backends.local import LocalBackend
    from hvdtrain.launch.detect import Detection
    from hvdtrain.topology import Topology

    folder = tmp_path_factory.mktemp("written")
    with LocalBackend(Detection(topology=Topology.single(), reason="", job_id="w"), device="cpu") as backend:
        module = model()
        replica = backend.replicate(module, optimizer(module))
        state, checkpoints = LoopState(backend, replica), Checkpoints(folder)
        for step in (1, 2):
            replica.backward(module(torch.ones(2, 3)).sum(), samples=2)
            replica.step()
            state.save(checkpoints, step)
        checkpoints.release()
    (folder / ".lock").unlink()
    return folder


@pytest.fixture
def copy(written, tmp_path):
    """Makes a copy of the two, and returns it and the newer one."""
    counter = iter(range(10**6))

    def copy():
        folder = tmp_path / str(next(counter))
        shutil.copytree(written, folder)
        return folder, folder / name_of(2)

    return copy


def cut(file, chance):
    content = file.read_bytes()
    file.write_bytes(content[: chance % len(content)])


def longer(file, chance):
    with file.open("ab") as stream:
        stream.write(bytes([chance % 256]) * (1 + chance % 5000))


def flipped(file, chance):
    content = bytearray(file.read_bytes())
    content[chance // 8 % len(content)] ^= 1 << chance % 8
    file.write_bytes(content)


def swapped(file, chance):
    other = file.with_name([name for name in ALL if name != file.name][chance % (len(ALL) - 1)])
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def older(file, chance):
    file.write_bytes((file.parent.with_name(name_of(1)) / file.name).read_bytes())


def huge(file, chance):
    os.truncate(file, 2**40 + chance)  # sparse: nobody has the time to read it


def replaced(make):
    def damage(file, chance):
        file.unlink()
        make(file)

    return damage


def bound_socket(file):
    with socket.socket(socket.AF_UNIX) as one:
        before = os.getcwd()
        os.chdir(file.parent)  # names of sockets are short
        one.bind(file.name)
        os.chdir(before)


def linked(file):
    file.symlink_to(file.parent.with_name(name_of(1)) / file.name)


DAMAGES = {
    "missing": lambda file, chance: file.unlink(),
    "empty": lambda file, chance: file.write_bytes(b""),
    "cut": cut,
    "longer": longer,
    "flipped": flipped,
    "swapped": swapped,
    "huge": huge,
    "garbage": lambda file, chance: file.write_bytes(hashlib.sha256(str(chance).encode()).digest() * 9),
    "a folder": replaced(Path.mkdir),
    "a FIFO": replaced(os.mkfifo),
    "a device": replaced(lambda file: os.mknod(file, 0o20666, os.makedev(1, 5))),  # /dev/zero: endless
    "a socket": replaced(bound_socket),
    "a link": replaced(linked),
    "a link to itself": replaced(lambda file: file.symlink_to(file.name)),
    "a link to nothing": replaced(lambda file: file.symlink_to("nothing")),
}


@pytest.mark.parametrize("examples", [25, SLOW])
def test_every_damage_of_every_file_is_found_and_the_checkpoint_before_is_taken(copy, examples, caplog):
    kinds = sorted(kind for kind in DAMAGES if kind != "a device" or os.geteuid() == 0)

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(name=st.sampled_from(ALL), damage=st.sampled_from(kinds), chance=st.integers(0, 2**20))
    def look(name, damage, chance):
        folder, newest = copy()
        DAMAGES[damage](newest / name, chance)
        caplog.clear()
        assert Checkpoints(folder).latest().step == 1
        assert "skipping a damaged checkpoint" in caplog.text
        with pytest.raises(CheckpointError) as error:
            check(newest)
        assert any(file in str(error.value) for file in ALL), error.value
        if damage != "swapped":
            assert name in str(error.value), error.value
        shutil.rmtree(folder)

    look()


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_each_kind_of_damage_once(copy, name):
    for kind, damage in DAMAGES.items():
        if kind == "a device" and os.geteuid() != 0:
            continue
        _, newest = copy()
        damage(newest / name, 12345)
        with pytest.raises(CheckpointError, match=r"\.(json|safetensors)"):
            check(newest)


def signed(newest):
    """Write a manifest that fits the files as they are now: damage by somebody who knows how."""
    manifest = json.loads((newest / MANIFEST).read_text())
    for name in FILES:
        content = (newest / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(newest, manifest)


def rewrite(newest, manifest):
    del manifest["sha256"]
    (newest / MANIFEST).write_bytes(to_json({**manifest, "sha256": _digest(manifest)}))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "swapped", "garbage"])
def test_damage_that_was_signed_again_is_found_by_its_form(copy, name, damage):
    folder, newest = copy()
    DAMAGES[damage](newest / name, 3)
    signed(newest)
    assert Checkpoints(folder).latest().step == 1
    with pytest.raises(CheckpointError, match=r"\.(json|safetensors)"):
        check(newest)


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", '"x"', "[" * 10**5, '{"a": 1, "a": 2}', "[{}, {}]", '[{"__type__": "tensor"}]']
)
@pytest.mark.parametrize("name", ["training.json", "ranks.json", MANIFEST])
def test_another_json_is_refused_before_or_when_it_is_loaded(copy, alone, name, text):
    _, newest = copy()
    (newest / name).write_text(text)
    if name != MANIFEST:
        signed(newest)
    module = model()
    with pytest.raises(CheckpointError):
        LoopState(alone, alone.replicate(module, optimizer(module))).load(newest)


def leaves(tree, path=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


@pytest.mark.parametrize("name", ["training.json", "ranks.json"])
@pytest.mark.parametrize("value", [None, *(pytest.param(one, marks=pytest.mark.slow) for one in (-1, "x", [], {}))])
def test_a_state_with_any_value_replaced_and_signed_again_loads_or_is_a_checkpoint_error(copy, alone, name, value):
    _, newest = copy()
    original = json.loads((newest / name).read_text())
    for path in [*leaves(original)][:: 1 if name == "ranks.json" else 5]:
        tree = json.loads(json.dumps(original))
        at = tree
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        (newest / name).write_bytes(to_json(tree))
        signed(newest)
        module = model()
        state = LoopState(alone, alone.replicate(module, optimizer(module)))
        try:
            state.load(newest)
        except CheckpointError:
            pass
        except Exception as error:
            pytest.fail(f"{path} = {value!r}: {type(error).__name__}: {error}\n{traceback.format_exc()}")


CHANGES = {
    "no files": lambda m: m.update(files={}),
    "a file less": lambda m: m["files"].pop("ranks.json"),
    "a file more": lambda m: m["files"].update({"../x": m["files"]["ranks.json"]}),
    "another step": lambda m: m.update(step=3),
    "a step below 0": lambda m: m.update(step=-2),
    "a step that is true": lambda m: m.update(step=True),
    "a step in text": lambda m: m.update(step="2"),
    "another format": lambda m: m.update(format=7),
    "no format": lambda m: m.pop("format"),
    "more ranks": lambda m: m.update(world_size=2),
    "no ranks": lambda m: m.update(world_size=0),
    "an extra key": lambda m: m.update(more=1),
    "an alias to nothing": lambda m: m["aliases"].update({"1.weight": "2.weight"}),
    "an alias of what is there": lambda m: m["aliases"].update({"0.bias": "1.bias"}),
    "an alias to a number": lambda m: m["aliases"].update({"1.weight": 1}),
    "aliases in a list": lambda m: m.update(aliases=[]),
    "an absurd size": lambda m: m["files"]["ranks.json"].update(bytes=10**30),
    "a size below 0": lambda m: m["files"]["ranks.json"].update(bytes=-1),
    "another hash": lambda m: m["files"]["ranks.json"].update(sha256="0" * 64),
    "a short hash": lambda m: m["files"]["ranks.json"].update(sha256="0"),
    "settings in a list": lambda m: m.update(settings=[]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_is_signed_and_wrong_is_found_and_the_checkpoint_before_is_taken(copy, change):
    folder, newest = copy()
    manifest = json.loads((newest / MANIFEST).read_text())
    CHANGES[change](manifest)
    rewrite(newest, manifest)
    assert Checkpoints(folder).latest().step == 1
    with pytest.raises(CheckpointError, match=str(newest)):
        check(newest)


def test_a_manifest_of_the_first_format_is_refused_with_a_way_on(copy):
    _, newest = copy()
    (newest / MANIFEST).write_text('{\n  "format": 1,\n  "step": 2,\n  "hvdtrain_version": "0.1.0"\n}')
    with pytest.raises(
        CheckpointError, match=r"has format 1; .* reads format 2. Go on with the hvdtrain .* \(0\.1\.0\)"
    ):
        check(newest)


@pytest.mark.parametrize("what", [*ALL, "."])
def test_what_this_user_may_not_read_is_named(copy, what, tmp_path):
    folder, newest = copy()
    (newest / what).chmod(0)
    if os.geteuid() != 0:
        with pytest.raises(CheckpointError, match="Permission denied"):
            check(newest)
        (newest / what).chmod(0o700)
        return
    for parent in [folder, *folder.parents]:  # so that somebody else gets as far as this
        if parent.owner() == "root" and str(parent).startswith(("/tmp/", "/dev/shm/")):
            parent.chmod(parent.stat().st_mode | 0o055)
    out = tmp_path / "said"
    out.touch()
    out.chmod(0o666)
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            check(newest)
        except CheckpointError as error:
            out.write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert "Permission denied" in out.read_text()
    assert (what if what != "." else newest.name) in out.read_text()


@pytest.mark.parametrize("damage", ["missing", "cut", "a link"])
def test_when_all_are_damaged_nothing_begins_anew_and_nothing_is_deleted(copy, alone, damage):
    folder, _ = copy()
    for step in (1, 2):
        DAMAGES[damage](folder / name_of(step) / "training.json", 3)
    with pytest.raises(
        CheckpointError, match=r"none of the 2 checkpoints in .* is whole .*--resume PATH; --resume never"
    ):
        Checkpoints(folder).find(alone)
    assert {step_of(path.name) for path in folder.iterdir()} == {1, 2}


def test_damaged_ones_that_were_passed_over_are_set_aside_and_not_deleted(copy, alone):
    folder, newest = copy()
    DAMAGES["flipped"](newest / "model.safetensors", 9)
    module = model()
    state = LoopState(alone, alone.replicate(module, optimizer(module)))
    checkpoints = Checkpoints(folder, keep=1)
    assert state.load(checkpoints) == 1
    state.save(checkpoints, 2)
    assert [path.name for path in folder.iterdir() if path.name != ".lock"] == [name_of(2)]
    assert (folder.with_name(f"{folder.name}.1") / name_of(2) / "model.safetensors").exists()
    assert load(alone, folder / name_of(2), model()).step == 2


@pytest.mark.parametrize("kind", ["a file", "a FIFO", "a link", "empty"])
def test_a_checkpoint_that_is_no_folder_is_found(copy, kind):
    folder, newest = copy()
    shutil.rmtree(newest)
    if kind == "a file":
        newest.touch()
    elif kind == "a FIFO":
        os.mkfifo(newest)
    elif kind == "a link":
        newest.symlink_to(name_of(1))
    else:
        newest.mkdir()
    assert Checkpoints(folder).latest().step == 1
    with pytest.raises(CheckpointError, match=newest.name):
        check(newest)
