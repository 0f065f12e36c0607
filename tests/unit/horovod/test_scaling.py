"""Factors and averages, dtype by dtype."""

from __future__ import annotations

import pytest
import torch

from hvdtrain.horovod.scaling import scale_, scaled


@pytest.mark.parametrize(
    ("dtype", "values", "factor", "expected"),
    [
        (torch.float32, [3.0], 0.5, [1.5]),
        (torch.float16, [3.0], 0.5, [1.5]),
        (torch.bfloat16, [3.0], 0.5, [1.5]),
        (torch.int32, [3, -3], 0.5, [1, -1]),
        (torch.uint8, [200], 1.1, [220]),
        (torch.int64, [2**40 + 1], 1.0, [2**40 + 1]),
        (torch.complex64, [2j], 0.5, [1j]),
    ],
)
def test_a_factor(dtype, values, factor, expected):
    tensor = torch.tensor(values, dtype=dtype)
    assert scaled(tensor, factor).tolist() == expected
    assert scaled(tensor, factor).dtype == dtype
    assert tensor.tolist() == values


@pytest.mark.parametrize("size", [1, 2, 3, 7, 49])
def test_an_average_of_equal_integers_is_that_integer(size):
    for value in (-7, 0, 5, 49):
        total = torch.tensor([value * size])
        scale_(total, torch.int64, 1.0, size)
        assert total.tolist() == [value]
    cut = torch.tensor([-7, 7])
    scale_(cut, torch.int64, 1.0, 2)
    assert cut.tolist() == [-3, 3]


def test_an_average_of_halves_divides_before_it_is_narrow():
    total = torch.tensor([120000.0])  # in float32, as it was summed
    scale_(total, torch.float16, 1.0, 2)
    assert total.to(torch.float16).tolist() == [60000.0]
