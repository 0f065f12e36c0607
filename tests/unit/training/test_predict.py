"""Predictions come in the order of the samples, none lost or doubled, in memory or in files; what cannot be ordered is refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError, OutputError
from hvdtrain.testing.threads import run_ranks
from hvdtrain.training.outputs import difference, taken_apart
from hvdtrain.training.predicting import Collecting

LENGTH = 11
X = torch.arange(LENGTH, dtype=torch.float32).reshape(LENGTH, 1)


class Telling:
    """A task whose predictions are whatever a function makes of a batch of numbers."""

    def __init__(self, predict):
        self._predict = predict

    def loss(self, model, batch):
        return model(batch[0]).mean()

    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch)}

    def predict(self, model, batch):
        assert not torch.is_grad_enabled()
        assert not model.training
        return self._predict(batch[0])


def trainer_of(alone, **options):
    torch.manual_seed(0)
    model = nn.Linear(1, 2)
    return hvdtrain.Trainer(alone, model, torch.optim.SGD(model.parameters()), **options)


def predict(alone, of_batch, data=None, batch_size=4, **options):
    data = ArrayDataset(X) if data is None else data
    return trainer_of(alone, task=Telling(of_batch)).predict(data, batch_size=batch_size, **options)


@pytest.mark.parametrize("data", [ArrayDataset(X), ArrayDataset(X, X), list(X)], ids=["(x,)", "(x, y)", "x"])
def test_without_a_predict_the_model_is_called_with_the_inputs(alone, data):
    trainer = trainer_of(alone, loss=nn.functional.mse_loss)
    found = trainer.predict(data, batch_size=4)
    assert torch.equal(found, trainer.replica.module(X).detach())
    assert not found.requires_grad
    assert not found.is_inference()
    assert trainer.replica.module.training


Pair = namedtuple("Pair", "double text")


@dataclass
class Found:
    boxes: Any
    note: Any = None


@pytest.mark.parametrize(
    ("of_batch", "of_all"),
    [
        (lambda x: x * 2, X * 2),
        (lambda x: {"a": x, "b": {"c": x.bfloat16()}}, {"a": X, "b": {"c": X.bfloat16()}}),
        (lambda x: Pair(x * 2, [str(i) for i in x.flatten().int().tolist()]), Pair(X * 2, [str(i) for i in range(LENGTH)])),
        (lambda x: Found([torch.zeros(int(i), 4) for i in x]), Found([torch.zeros(i, 4) for i in range(LENGTH)])),
        (lambda x: x.flatten() > 3, X.flatten() > 3),
        (lambda x: x.numpy().astype("U5"), X.numpy().astype("U5")),
        (lambda x: (x.int(), None), (X.int(), None)),
    ],
    ids=["tensor", "dictionary", "named tuple", "dataclass", "flags", "array of text", "nothing"],
)  # fmt: skip
def test_a_tree_of_outputs_is_the_same_tree_for_all_samples(alone, of_batch, of_all):
    found = predict(alone, of_batch)
    assert type(found) is type(of_all)
    assert repr(found) == repr(of_all)


def test_the_order_is_the_data_sets_or_its_samplers_and_never_shuffled(alone):
    data = ArrayDataset(X)
    assert torch.equal(predict(alone, lambda x: x, DataLoader(data, 3, shuffle=True), None), X)
    backwards = DataLoader(data, 3, sampler=range(LENGTH - 1, -1, -1))
    assert torch.equal(predict(alone, lambda x: x, backwards, None), X.flip(0))
    assert torch.equal(predict(alone, lambda x: x, DataLoader(data, 3, drop_last=True, num_workers=2), None), X)


def test_files_can_be_read_by_numpy_and_json(alone, tmp_path):
    def outputs(x):
        return {"y": x * 2, "half": (x / 4).bfloat16(), "seen": [{"n": int(i), "at": torch.tensor([i, 1])} for i in x]}

    folder = predict(alone, outputs, to=tmp_path / "a" / "found")
    assert folder == tmp_path / "a" / "found"
    assert sorted(file.name for file in folder.iterdir()) == ["half.npy", "seen.jsonl", "y.npy"]
    y = np.load(folder / "y.npy", mmap_mode="r")
    assert (y.dtype, y.tolist()) == (np.float32, (X * 2).tolist())
    assert np.array_equal(np.load(folder / "half.npy"), (X / 4).numpy())
    lines = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    assert lines == [{"n": i, "at": [i, 1]} for i in range(LENGTH)]
    assert [file.name for file in folder.parent.iterdir()] == ["found"]


def test_a_single_tensor_is_the_file_output(alone, tmp_path):
    predict(alone, lambda x: x.short(), to=str(tmp_path / "found"))
    assert np.load(tmp_path / "found" / "output.npy").tolist() == X.tolist()


def test_a_word_that_is_none_of_those_known_makes_no_folder(alone):
    with pytest.raises(
        ConfigError, match=r"to='rank1' is neither 'rank0' nor 'all'; for a folder of that name give '\./rank1'"
    ):
        predict(alone, lambda x: x, to="rank1")


def test_a_folder_with_something_in_it_is_left_alone(alone, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is there already; name a new folder"):
        predict(alone, lambda x: x, to=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_what_ended_early_leaves_no_folder(alone, tmp_path):
    def outputs(x):
        if 8 in x:
            raise KeyError("a broken sample")
        return x

    with pytest.raises(KeyError):
        predict(alone, outputs, to=tmp_path / "found")
    assert list(tmp_path.iterdir()) == []


@contextmanager
def disk_of(size):
    """No file may become larger, which is told as a full disk is: where it is written, or where it is closed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("width", [20, 10_000], ids=["when the files are closed", "when they are written"])
def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing(alone, tmp_path, width):
    with disk_of(300), pytest.raises(OutputError, match=r"predictions cannot be written to .*found: File too large"):
        predict(alone, lambda x: {"a": x.repeat(1, width), "b": x.repeat(1, width)}, to=tmp_path / "found")
    assert list(tmp_path.iterdir()) == []


def test_links_and_relative_paths_lead_where_they_led_at_the_beginning(alone, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "to nothing").symlink_to(tmp_path / "new")
    monkeypatch.chdir(tmp_path)

    def outputs(x):
        os.chdir(tmp_path / "elsewhere")
        return x

    assert predict(alone, outputs, to="./found") == tmp_path / "found"
    assert predict(alone, outputs, to=tmp_path / "link") == tmp_path / "empty"
    assert predict(alone, outputs, to=tmp_path / "to nothing") == tmp_path / "new"
    for name in ("found", "empty", "new", "link", "to nothing"):
        assert np.load(tmp_path / name / "output.npy").tolist() == X.tolist()
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("to", [".", "/proc"], ids=["the working directory", "a mount"])
def test_a_folder_that_cannot_be_replaced_as_a_whole_is_refused_before_the_work(alone, tmp_path, monkeypatch, to):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))  # as if it were empty
    with pytest.raises(OutputError, match="cannot be put in place as a whole; name a new folder in it"):
        predict(alone, lambda x: pytest.fail("was computed"), to=Path(to))


@pytest.mark.parametrize("to", [None, 3, b"found"])
def test_what_is_no_destination_is_one_sentence(alone, to):
    with pytest.raises(ConfigError, match="must be 'rank0', 'all' or the path of a folder, and is a"):
        predict(alone, lambda x: x, to=to)


def test_what_a_killed_run_left_is_written_over_and_what_others_have_there_is_not(alone, tmp_path):
    left = tmp_path / "found.partial"
    left.mkdir()
    (left / "output.npy").write_text("half of it")
    with pytest.raises(OutputError, match=r"found.partial, where the predictions are written first, is something else"):
        predict(alone, lambda x: x, to=tmp_path / "found")
    assert (left / "output.npy").read_text() == "half of it"
    (left / ".lock").touch()
    (left / "other.npy").touch()
    folder = predict(alone, lambda x: x, to=tmp_path / "found")
    assert [file.name for file in folder.iterdir()] == ["output.npy"]
    assert np.load(folder / "output.npy").tolist() == X.tolist()
    assert not left.exists()


def test_two_at_once_never_write_into_each_others_folder(alone, tmp_path):
    to = tmp_path / "found"
    holder = subprocess.Popen(
        [sys.executable, "-c", "from hvdtrain.folder_lock import take\nfrom pathlib import Path\nimport sys\n"
         "lock = take(Path(sys.argv[1]))\nprint(flush=True)\nsys.stdin.read()", str(tmp_path / "found.partial" / ".lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        holder.stdout.readline()
        with pytest.raises(OutputError, match=f"is being written by another job, process {holder.pid}"):
            predict(alone, lambda x: x, to=to)
    finally:
        holder.communicate()

    def outputs(x):
        if 0 in x:
            with pytest.raises(OutputError, match="is being written by this process already"):
                predict(alone, lambda x: x + 100, to=to)
        return x

    assert np.load(predict(alone, outputs, to=to) / "output.npy").tolist() == X.tolist()


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_half_precision_complex_numbers_are_files_of_wider_ones(alone, tmp_path):
    folder = predict(alone, lambda x: (x * 1j).to(torch.complex32), to=tmp_path / "found")
    assert np.array_equal(np.load(folder / "output.npy"), (X * 1j).numpy())


def test_a_place_that_cannot_be_is_one_sentence(alone):
    with pytest.raises(OutputError, match="predictions cannot be written to /proc/found"):
        predict(alone, lambda x: x, to="/proc/found")


@pytest.mark.parametrize(
    ("of_batch", "message"),
    [
        (lambda x: x.mean(), r"output has shape \(\) for a batch of 4 samples; return tensors whose first dimension"),
        (lambda x: {"a": (x, x.T)}, r"output\['a'\]\[1\] has shape \(1, 4\) for a batch of 4 samples"),
        (lambda x: list("abc"), "output is a list of 3 for a batch of 4"),
        (lambda x: "text", "output is a str; a prediction holds tensors or arrays"),
        (lambda x: {"n": 3}, r"output\['n'\] is a int"),
        (lambda x: None, "must hold a tensor, an array or a list, and is a NoneType"),
        (lambda x: {}, "must hold a tensor, an array or a list, and is a dict"),
        (lambda x: x.to_sparse(), "output is a sparse, nested or quantized tensor"),
        (lambda x: np.ma.masked_array(x.numpy(), x.numpy() > 3), "output is a masked array, whose mask would be lost"),
        (lambda x: [(i for i in "ab") for _ in x], "holds a generator, which cannot be sent to another rank"),
        (lambda x: x.expand(-1, int(x[0]) + 1), r"differ between batches: output is a tensor of float32 of shape \(samples, 1\) for some, and"),
        (lambda x: x if 0 in x else x.double(), "differ between batches: output is a tensor of float32"),
        (lambda x: {"a": x} if 0 in x else {"b": x}, "differ between batches: some hold a, others b"),
    ],
    ids=range(13),
)  # fmt: skip
def test_what_cannot_be_put_in_order_is_refused_by_name(alone, of_batch, message):
    with pytest.raises(ConfigError, match=message):
        predict(alone, of_batch)


@pytest.mark.parametrize(
    ("of_batch", "message"),
    [
        (lambda x: {"../a": x}, r"'\.\./a' cannot be one"),
        (lambda x: {"a.b": x, "a": {"b": x}}, "'a.b' cannot be one, or is there twice"),
        (lambda x: [object() for _ in x], "of output cannot be written as JSON: a object has no form"),
        (lambda x: x.numpy().astype(object), "array of Python objects cannot be written"),
    ],
    ids=["path", "twice", "object", "array of objects"],
)
def test_what_no_file_can_hold_is_refused(alone, tmp_path, of_batch, message):
    with pytest.raises(ConfigError, match=message):
        predict(alone, of_batch, to=tmp_path / "found")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_data_set_is_refused(alone):
    with pytest.raises(ConfigError, match="0 samples"):
        predict(alone, lambda x: x, ArrayDataset(X[:0]))


class Note:
    def __init__(self):
        self.value = 0


def test_what_a_list_holds_may_be_used_again_for_the_next_batch(alone):
    room, notes, kept = torch.zeros(4, 1), [Note() for _ in range(4)], [{} for _ in range(4)]

    def outputs(x):
        room[: len(x)] = x
        for value, row, note, one in zip(x, room, notes, kept, strict=False):
            note.value, one["at"] = float(value), {"row": row}
        return {"notes": notes[: len(x)], "kept": kept[: len(x)]}

    found = predict(alone, outputs)
    assert [note.value for note in found["notes"]] == X.flatten().tolist()
    assert [float(one["at"]["row"]) for one in found["kept"]] == X.flatten().tolist()
    assert taken_apart([{"row": room[0]}] * 4, 4).columns[()][0]["row"].untyped_storage().nbytes() == 4


def test_outputs_are_copies():
    wide = torch.zeros(4, 1000)
    outputs = taken_apart({"a": wide[:, :1], "b": wide}, 4)
    assert outputs.columns["a",].untyped_storage().nbytes() == 16
    assert difference(outputs, outputs) == ""
    wide.fill_(1)
    assert outputs.columns["b",].sum() == 0


@settings(max_examples=40, deadline=None)
@given(
    rounds=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=12).filter(
        lambda all: any(map(any, all))
    ),
    most_bytes=st.sampled_from([0, 40, 2**20]),
    to=st.sampled_from(["rank0", "all"]),
)
def test_whatever_the_ranks_have_in_each_round_is_put_together_in_order(rounds, most_bytes, to):
    total = sum(map(sum, rounds))

    def body(communicator):
        rank, position = communicator.wire.rank, 0
        collecting = Collecting(communicator, total, to, exchange_bytes=most_bytes)
        for number, counts in enumerate(rounds, 1):
            first, mine = position + sum(counts[:rank]), counts[rank]
            values = torch.arange(first, first + mine)
            piece = collecting.piece({"n": values, "text": [str(n) for n in values.tolist()]}, mine) if mine else None
            collecting.add(piece, last=number == len(rounds))
            position += sum(counts)
        return collecting.result()

    for rank, found in enumerate(run_ranks(3, body)):
        if to == "all" or rank == 0:
            assert found["n"].tolist() == list(range(total))
            assert found["text"] == list(map(str, range(total)))
        else:
            assert found is None


def test_a_loader_of_parts_for_each_rank_is_refused(alone):
    loader = alone.loader(ArrayDataset(X), batch_size=2, partition="sample")
    with pytest.raises(ConfigError, match="by partition='sample'; pass the data set itself"):
        predict(alone, lambda x: x, loader)
