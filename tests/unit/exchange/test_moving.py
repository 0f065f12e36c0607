"""Models go out to the formats of others and come back bit for bit; what is damaged, foreign or hostile is refused."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from disk import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from hvdtrain.backends.local import LocalBackend
from hvdtrain.cli.commands import main
from hvdtrain.errors import CheckpointError
from hvdtrain.exchange.dcp import _Records
from hvdtrain.exchange.files import check_torch
from hvdtrain.exchange.moving import FORMATS, export_checkpoint, import_file, read_foreign
from hvdtrain.launch.detect import Detection
from hvdtrain.topology import Topology
from hvdtrain.training.checkpoint import Checkpoints
from hvdtrain.training.checkpoint_files import check, read_state
from hvdtrain.training.loop_state import LoopState


class Odd(nn.Module):
    """Tied weights, a scalar, nothing at all, halves that lie transposed, and values that are not equal to themselves."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("none", torch.empty(0))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("halves", torch.randn(2, 3).bfloat16().t())
        self.register_buffer("odd", torch.tensor([float("nan"), -0.0, float("-inf")], dtype=torch.float64))

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),  # has no state at all
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "groups": lambda parameters: torch.optim.Adam([{"params": [one]} for one in parameters], lr=torch.tensor(0.1)),
    "two groups": lambda p: torch.optim.RMSprop([{"params": p[1:], "lr": 0.5}, {"params": p[:1]}], lr=0.1),
}


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).tolist()


def same(one, other):
    """Whether two states are equal in every bit and every type."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and bits(one) == bits(other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def in_one_process():
    return LocalBackend(Detection(topology=Topology.single(), reason="test", job_id="test"), device="cpu")


class Loop:
    def __init__(self, backend, folder, optimizer="AdamW", seed=0):
        torch.manual_seed(seed)
        self.model = Odd()
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.parameters()))
        self.replica = backend.replicate(self.model, self.optimizer)
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.state = LoopState(backend, self.replica, position=Counter())

    def train(self, steps):
        for _ in range(steps):
            x = torch.randn(4, 3)
            self.replica.backward(self.model(x).square().mean(), samples=4)
            self.replica.step()
        return self.state.save(self.checkpoints, steps)


class Counter:
    def state_dict(self):
        return {"steps": 3}

    def load_state_dict(self, state):
        self.loaded = state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with checkpoints of steps 2 and 3, and the loop that wrote them."""
    folder = tmp_path_factory.mktemp("run")
    with in_one_process() as backend:
        loop = Loop(backend, folder)
        loop.train(2)
        loop.train(3)
        yield folder, loop


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", FORMATS)
def test_the_exported_model_is_what_the_format_says_and_equal_in_every_bit(run, tmp_path, form):
    folder, loop = run
    moved = export_checkpoint(folder, tmp_path / "deep" / "out", form=form)
    assert (moved.step, moved.tensors) == (3, len(loop.model.state_dict()))
    own = loop.model.state_dict()
    if form == "safetensors":
        found = load_file(moved.path)
    elif form == "torch":
        found = torch.load(moved.path, weights_only=True)
        assert found["a.weight"].data_ptr() == found["b.weight"].data_ptr()
    else:
        found = {name: torch.zeros_like(value) for name, value in own.items()}
        dcp.load(found, checkpoint_id=moved.path)
    assert {name: bits(value) for name, value in found.items()} == {name: bits(value) for name, value in own.items()}
    Odd().load_state_dict(found)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_model_and_optimizer_come_back_equal_in_every_bit(tmp_path, form, optimizer):
    with in_one_process() as backend:
        loop = Loop(backend, tmp_path / "run", optimizer)
        loop.train(3)
        out = tmp_path / "out"
        export_checkpoint(tmp_path / "run", out, form=form, optimizer=True)
        if form == "torch":
            assert same(torch.load(out, weights_only=True)["optimizer"], loop.optimizer.state_dict())
        moved = import_file(out, tmp_path / "new")
        assert (moved.step, moved.optimizer) == (0, True)
        other = Loop(backend, tmp_path / "new", optimizer, seed=1)
        assert other.state.load(other.checkpoints) == 0
        assert same(dict(other.model.state_dict()), dict(loop.model.state_dict()))
        assert same(ordered(other.optimizer.state_dict()), ordered(loop.optimizer.state_dict()))


@pytest.mark.parametrize("form", FORMATS)
def test_out_and_in_and_out_again_gives_the_same_model(run, tmp_path, form):
    export_checkpoint(run[0], tmp_path / "one", form=form)
    import_file(tmp_path / "one", tmp_path / "new")
    export_checkpoint(tmp_path / "new", tmp_path / "two", form=form)
    first, second = read_foreign(tmp_path / "one").model, read_foreign(tmp_path / "two").model
    assert {name: bits(value) for name, value in first.items()} == {name: bits(v) for name, v in second.items()}


def test_the_commands_say_what_they_wrote(run, tmp_path, capsys):
    out, new = str(tmp_path / "out"), str(tmp_path / "new")
    assert main(["export", str(run[0]), out, "--format", "torch", "--optimizer"]) == 0
    assert main(["import", out, new]) == 0
    assert capsys.readouterr().out == (
        f"wrote {out}: 13 tensors and the optimizer's state of {run[0]}/checkpoints/step-00000003\n"
        f"wrote {new}/checkpoints/step-00000000: 13 tensors and the optimizer's state\nnext: hvdtrain --run-dir {new}\n"
    )


def test_nothing_in_a_run_that_goes_on_is_touched(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    being_written = folder / "checkpoints" / "partial-1-step-00000004"
    being_written.mkdir()
    (being_written / "model.safetensors").write_bytes(b"half")
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    export_checkpoint(folder, tmp_path / "out")
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_a_checkpoint_or_its_folder_is_named_as_well_as_a_run(run, tmp_path):
    folder = run[0]
    assert export_checkpoint(folder / "checkpoints", tmp_path / "a").step == 3
    assert export_checkpoint(folder / "checkpoints" / "step-00000002", tmp_path / "b").step == 2


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(run, tmp_path, caplog):
    folder = shutil.copytree(run[0], tmp_path / "run")
    os.truncate(folder / "checkpoints" / "step-00000003" / "model.safetensors", 100)
    assert export_checkpoint(folder, tmp_path / "out").step == 2
    assert "step-00000003" in caplog.text
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        export_checkpoint(folder / "checkpoints" / "step-00000003", tmp_path / "other")
    os.truncate(folder / "checkpoints" / "step-00000002" / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints of .* are damaged"):
        export_checkpoint(folder, tmp_path / "other")


CONTAINERS = {
    "a state_dict": lambda model, optimizer: model,
    "model_state_dict": lambda model, optimizer: {
        "epoch": 3,
        "model_state_dict": model,
        "optimizer_state_dict": optimizer,
    },
    "state_dict": lambda model, optimizer: {"state_dict": model, "optimizer": optimizer},
    "app": lambda model, optimizer: {"app": {"model": model, "optim": optimizer}},
    "without an optimizer": lambda model, optimizer: {"model": model, "optimizer": None},
    "by name": lambda model, optimizer: {"model": model, "optimizer": named(optimizer)},
}


def named(optimizer):
    """As torch.distributed.checkpoint.state_dict has it."""
    names = ["a.weight", "a.bias", "b.bias", "norm.weight", "norm.bias"]
    return {
        "state": {names[key]: value for key, value in optimizer["state"].items()},
        "param_groups": [{**one, "params": [names[key] for key in one["params"]]} for one in optimizer["param_groups"]],
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_what_others_write_is_understood(run, tmp_path, form, container):
    loop = run[1]
    model, optimizer = dict(loop.model.state_dict()), loop.optimizer.state_dict()
    written = CONTAINERS[container](model, optimizer)
    if form == "torch":
        torch.save(written, tmp_path / "file")
    else:
        dcp.save(written, checkpoint_id=tmp_path / "file")
    found = read_foreign(tmp_path / "file")
    assert same(ordered(found.model), ordered(model))
    if container in ("a state_dict", "without an optimizer"):
        assert found.optimizer is None
    else:
        assert same(ordered(found.optimizer), ordered(optimizer))


def ordered(state):
    """DCP returns dictionaries in an order of its own."""
    if isinstance(state, list):
        return [ordered(one) for one in state]
    return {key: ordered(state[key]) for key in sorted(state)} if isinstance(state, dict) else state


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return open, (self.file, "w")


def planted_in_torch(path, evidence, run):
    torch.save({"model": {"w": torch.ones(1)}, "more": Planted(evidence)}, path)


def planted_in_metadata(path, evidence, run):
    export_checkpoint(run, path, form="dcp")
    (path / ".metadata").write_bytes(pickle.dumps(Planted(evidence)))


def planted_in_a_value(path, evidence, run):
    dcp.save({"model": {"w": torch.ones(1)}, "optimizer": {"param_groups": [Planted(evidence)]}}, checkpoint_id=path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("plant", [planted_in_torch, planted_in_metadata, planted_in_a_value])
def test_a_file_that_would_run_code_runs_none(run, tmp_path, plant):
    evidence = tmp_path / "evidence"
    plant(tmp_path / "file", evidence, run[0])
    with pytest.raises(CheckpointError):
        import_file(tmp_path / "file", tmp_path / "new")
    assert not evidence.exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ("2.4.0", False),
        ("2.5.1+cu124", False),
        ("2.9.1", False),
        ("2.10.0", True),
        ("2.13.0+cu130", True),
        ("3.0", True),
    ],
)
def test_a_torch_whose_restricted_unpickling_was_breached_reads_no_such_file_unless_it_is_trusted(version, safe):
    check_torch(version, "file", trusted=True)
    if safe:
        check_torch(version, "file", trusted=False)
    else:
        with pytest.raises(CheckpointError, match=r"below 2\.10.*--trusted"):
            check_torch(version, "file", trusted=False)


def folder_of_another_kind(path):
    path.mkdir()


def whole_module(path):
    torch.save(nn.Linear(1, 1), path)


def outside(path):
    path.mkdir()
    dcp.save({"w": torch.ones(1)}, checkpoint_id=path)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../../etc/passwd"
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


class Reaches:
    """Pickled as Python before 3.11.4 pickles an enumeration's member: by getattr."""

    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return getattr, self.what


def reaching(path):
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(Reaches(Metadata, "__subclasses__")))


def test_metadata_of_an_older_python_is_read(tmp_path):
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    written = pickle.dumps(Reaches(_MEM_FORMAT_ENCODING, member.name))
    assert _Records(io.BytesIO(written)).load() is member


REFUSED = {
    "nothing there": (lambda path: None, "does not exist"),
    "an empty file": (lambda path: path.touch(), "neither a safetensors file"),
    "text": (lambda path: path.write_text("weights: none"), "neither a safetensors file"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "neither a safetensors file"),
    "a folder": (folder_of_another_kind, "no torch.distributed.checkpoint"),
    "a FIFO": (os.mkfifo, "neither a file nor a folder"),
    "a dead link": (lambda path: path.symlink_to("nowhere"), "does not exist"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "does not exist|cannot be read"),
    "a whole module": (whole_module, "holds more than plain tensors"),
    "a number": (lambda path: torch.save(3, path), "holds a int, not a model's state_dict"),
    "no tensors": (lambda path: torch.save({}, path), "is empty"),
    "text for a tensor": (lambda path: torch.save({"w": "no"}, path), "'w' is a str"),
    "a sparse tensor": (lambda path: torch.save({"w": torch.eye(2).to_sparse()}, path), "no dense tensor"),
    "an optimizer alone": (lambda path: torch.save({"state": {}, "param_groups": []}, path), "is no state_dict"),
    "half an optimizer": (
        lambda path: torch.save({"model": {"w": torch.ones(1)}, "optimizer": {"state": {}}}, path),
        "no 'param_groups'",
    ),
    "an optimizer that does not fit itself": (
        lambda path: torch.save(
            {"model": {"w": torch.ones(1)}, "optimizer": {"state": {4: {}}, "param_groups": [{"params": [0]}]}}, path
        ),
        "4 is in no param_groups",
    ),
    "a file outside": (outside, "outside of its folder"),
    "metadata that reaches for an attribute": (reaching, "asks for an attribute"),
    "a huge header": (lambda path: path.write_bytes(b"\xff" * 8 + b"{"), "no whole safetensors file"),
    "no tensors in safetensors": (lambda path: save_file({}, path), "is empty"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")  # torch 2.15 does, before it is refused
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_is_refused_by_one_sentence(tmp_path, case):
    make, message = REFUSED[case]
    make(tmp_path / "file")
    with pytest.raises(CheckpointError, match=message) as refused:
        import_file(tmp_path / "file", tmp_path / "new")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_is_no_file_to_import(run, tmp_path):
    with pytest.raises(CheckpointError, match="--resume"):
        import_file(run[0] / "checkpoints" / "step-00000003", tmp_path / "new")


def test_a_run_begins_only_once(run, tmp_path):
    export_checkpoint(run[0], tmp_path / "out")
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        import_file(tmp_path / "out", run[0])
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        import_file(tmp_path / "out", run[0] / "checkpoints")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("there", ["file", "folder", "link"])
def test_nothing_is_written_over(run, tmp_path, form, there):
    out = tmp_path / "out"
    {"file": out.touch, "folder": out.mkdir, "link": lambda: out.symlink_to("nowhere")}[there]()
    with pytest.raises(CheckpointError, match="is there already"):
        export_checkpoint(run[0], out, form=form)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, form):
    with in_one_process() as backend:
        replica = backend.replicate(nn.Linear(300, 300), None)
        LoopState(backend, replica).save(Checkpoints(tmp_path / "run" / "checkpoints"), 1)
    (tmp_path / "there").mkdir()
    with full_disk(10_000), pytest.raises(CheckpointError, match="could not write"):
        export_checkpoint(tmp_path / "run", tmp_path / "there" / "out", form=form)
    assert list((tmp_path / "there").iterdir()) == []


def test_what_cannot_be_exported_is_said(run, tmp_path):
    for source, message in {
        tmp_path / "gone": "no folder of a run",
        tmp_path: "has no checkpoint",
        run[0]: "holds the model alone",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(source, tmp_path / "out", optimizer=source == run[0])
    with in_one_process() as backend:
        LoopState(backend, backend.replicate(nn.Linear(1, 1), None)).save(Checkpoints(tmp_path / "bare"), 1)
        model = nn.Linear(1, 1, bias=False, dtype=torch.complex128)
        LoopState(backend, backend.replicate(model, None)).save(Checkpoints(tmp_path / "complex"), 1)
    with pytest.raises(CheckpointError, match="no optimizer's state"):
        export_checkpoint(tmp_path / "bare", tmp_path / "out", form="torch", optimizer=True)
    with pytest.raises(CheckpointError, match=r"'weight' is of torch.complex128, .* --format torch or dcp"):
        export_checkpoint(tmp_path / "complex", tmp_path / "out")
    export_checkpoint(tmp_path / "complex", tmp_path / "out", form="torch")
    assert torch.equal(torch.load(tmp_path / "out", weights_only=True)["weight"], model.weight)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for form in FORMATS:
        export_checkpoint(run[0], folder / form, form=form, optimizer=form != "safetensors")
    return folder


DAMAGED = ["safetensors", "torch", "dcp/.metadata", "dcp/__0_0.distcp"]


@pytest.mark.parametrize("name", DAMAGED)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_and_nothing_else_happens(exported, tmp_path, name, data):
    whole = (exported / name).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["cut", "flip", "longer", "zeros"]))
    damaged = {
        "cut": whole[:at],
        "flip": whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :],
        "longer": whole + b"x" * (at + 1),
        "zeros": whole[:at] + bytes(min(64, len(whole) - at)) + whole[at + 64 :],
    }[kind]
    copy = tmp_path / "copy"
    if copy.is_dir():
        shutil.rmtree(copy)
    top = name.split("/")[0]
    if "/" in name:
        shutil.copytree(exported / top, copy)
        (copy / name.split("/")[1]).write_bytes(damaged)
    else:
        copy.write_bytes(damaged)
    try:
        found = read_foreign(copy)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert found.model
        assert kind != "cut" or name == "dcp/__0_0.distcp"


def test_an_imported_checkpoint_is_one_like_any_other_of_no_rank(run, tmp_path):
    export_checkpoint(run[0], tmp_path / "out")
    saved = check(Path(import_file(tmp_path / "out", tmp_path / "new").path))
    assert (saved.step, saved.world_size) == (0, 0)
    assert (read_state(Path(saved.path), "ranks"), read_state(Path(saved.path), "training")["optimizer"]) == ([], None)
