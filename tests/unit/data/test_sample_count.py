"""How many samples a batch has, for whatever a collate function makes, and where that cannot be seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import TensorDataset, default_collate

from hvdtrain.data.sample_count import SampleCount


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    texts: list[str]
    pixels: Tensor
    rate: float = 0.5


COLLATES: dict[str, tuple[Callable[[list[Tensor]], Any], str]] = {
    "tensors": (default_collate, "batch, dimension 0"),
    "fields": (lambda rows: {"x": torch.stack(rows), "y": ["?"] * len(rows), "n": 7}, "batch['x'], dimension 0"),
    "time first": (lambda rows: (pad_sequence(rows), torch.eye(3)), "batch[0], dimension 1"),
    "padded": (lambda rows: pad_sequence(rows, batch_first=True), "batch, dimension 0"),
    "objects": (lambda rows: Batch([str(row) for row in rows], torch.stack(rows)), "batch.texts, its length"),
    "arrays": (lambda rows: [torch.stack(rows).numpy(), None], "batch[0], dimension 0"),
    "rows": (lambda rows: [{"x": row} for row in rows], "batch, its length"),
    "graph": (lambda rows: {"nodes": torch.cat(rows), "of": torch.arange(len(rows))}, "batch['of'], dimension 0"),
}


def made(collate: Callable[[list[Tensor]], Any], samples: int) -> Any:
    return collate([torch.arange(8.0)] * samples)


@pytest.mark.parametrize(("collate", "place"), COLLATES.values(), ids=COLLATES)
def test_it_is_seen_where_a_batch_of_three_has_one_more_than_a_batch_of_two(collate: Any, place: str) -> None:
    count = SampleCount(made(collate, 2), made(collate, 3))
    assert count.place == place
    for samples in (1, 3, 8):
        assert count(made(collate, samples)) == samples


@given(st.integers(1, 9))
def test_tokens_in_one_row_are_no_samples(samples: int) -> None:
    count = SampleCount(made(torch.cat, 2), made(torch.cat, 3))
    assert count.place == ""
    assert count(made(torch.cat, samples)) is None


def test_places_that_disagree_and_batches_of_another_kind_say_nothing() -> None:
    count = SampleCount((torch.zeros(2), torch.zeros(2)), (torch.zeros(3), torch.zeros(3)))
    assert count((torch.zeros(4), torch.zeros(4))) == 4
    assert count((torch.zeros(4), torch.zeros(5))) is None
    assert count({"x": torch.zeros(4)}) is None
    assert count((torch.zeros(()), 3)) is None


def test_the_data_sets_of_torch_that_fetch_whole_batches_show_it_too() -> None:
    pair = [TensorDataset(torch.zeros(5, 2)).tensors[0][:size] for size in (2, 3)]
    assert SampleCount(*pair)(torch.zeros(5, 2)) == 5
