import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hvdtrain
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.tasks.byte_language_model import NOTHING, ByteLanguageModel, Windows

TEXT = b"the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text").write_bytes(TEXT)
    return str(tmp_path / "text")


@given(first=st.integers(0, 40), length=st.integers(2, 60), context=st.integers(1, 20))
def test_each_byte_but_the_first_is_predicted_once(tmp_path_factory, first, length, context):
    file = tmp_path_factory.getbasetemp() / "bytes"
    file.write_bytes(bytes(range(200)))
    windows = Windows(file, range(first, first + length), context)
    predicted = [byte for window in (windows[i] for i in range(len(windows))) for byte in window[1:].tolist()]
    assert predicted == list(range(first + 1, first + length))
    assert all(2 <= len(windows[i]) <= context + 1 for i in range(len(windows)))
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_a_text_that_is_cut_off_or_removed_meanwhile_is_said(text):
    windows = ByteLanguageModel(text, context=12).train_data()
    last = len(windows) - 1
    assert len(windows[last]) > 1
    Path(text).write_bytes(TEXT[:13])
    assert len(windows[0]) == 13
    with pytest.raises(DataError, match="has become shorter"):
        windows[last]
    Path(text).unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        windows[0]


def test_no_prediction_sees_what_follows(text):
    task = ByteLanguageModel(text, context=12, width=8, layers=2, heads=2)
    torch.manual_seed(0)
    model = task.build_model().eval()
    read, _ = task.collate([task.train_data()[0]])
    with torch.no_grad():
        before, read[0, 7] = model(read), 0
        after = model(read)
    assert torch.allclose(before[0, :7], after[0, :7], atol=1e-6)
    assert not torch.allclose(before[0, 7:], after[0, 7:], atol=1e-3)


def test_padding_changes_nothing_and_counts_nothing(text):
    task = ByteLanguageModel(text, context=30, width=8, layers=1, heads=1)
    torch.manual_seed(0)
    model = task.build_model()
    short, long = torch.tensor([5, 6, 7]), task.train_data()[1]
    both = task.collate([short, long])
    assert task.weight_of(both) == 2 + 30
    assert (both[1][0] == NOTHING).sum() == 28
    parts = [(task.collate([window]), len(window) - 1) for window in (short, long)]
    expected = sum(task.loss(model, batch) * weight for batch, weight in parts) / 32
    torch.testing.assert_close(task.loss(model, both), expected)


def test_it_learns(text):
    task = ByteLanguageModel(text, context=32, width=32, layers=1, heads=2)
    torch.manual_seed(0)
    model = task.build_model()
    with hvdtrain.init("local") as backend:
        trainer = hvdtrain.Trainer(backend, model, torch.optim.AdamW(model.parameters(), lr=1e-2), task=task)
        result = trainer.fit(task.train_data(), task.eval_data(), epochs=6, global_batch_size=4)
    assert result.eval_metrics["bits_per_byte"] == pytest.approx(result.eval_metrics["loss"] / math.log(2))
    assert result.eval_metrics["bits_per_byte"] < 1
    assert result.eval_metrics["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": 0}, "--task.context"),
        ({"width": 10, "heads": 4}, "multiple of heads"),
        ({"dropout": 1.0}, "dropout"),
        ({"eval_fraction": -0.1}, "eval_fraction"),
    ],
)
def test_values_that_cannot_work_are_refused(text, values, message):
    with pytest.raises(ConfigError, match=message):
        ByteLanguageModel(text, **values)


@pytest.mark.parametrize("content", [None, b"", b"a", b"abc"])
def test_a_text_that_cannot_be_learned_is_refused(tmp_path, content):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"--task\.file"):
        ByteLanguageModel(str(file), eval_fraction=0.3)
