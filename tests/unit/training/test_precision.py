"""What each precision makes of parameters, batches and losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.training.precision import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "parameters", "computes"),
    [
        ("fp32", torch.float32, torch.float32),
        ("fp64", torch.float64, torch.float64),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
    ],
)
def test_parameters_and_products_have_the_types_of_the_precision(name, parameters, computes):
    precision = Precision(name, CPU)
    model = precision.prepare(nn.Linear(4, 4))
    assert model.weight.dtype == parameters
    batch = precision.cast({"x": torch.ones(2, 4), "label": torch.ones(2, dtype=torch.int64)})
    assert batch["label"].dtype == torch.int64
    with precision.autocast():
        assert model(batch["x"]).dtype == computes


@pytest.mark.parametrize(
    ("name", "kind"), [("fp32", torch.complex64), ("bf16", torch.complex64), ("fp64", torch.complex128)]
)
def test_complex_numbers_keep_their_imaginary_parts(name, kind):
    model = nn.Linear(2, 2)
    model.register_buffer("turns", torch.tensor([1j, 2 + 1j]))
    model.register_parameter("phase", nn.Parameter(torch.tensor([3j])))
    Precision(name, CPU).prepare(model)
    assert (model.turns.dtype, model.phase.dtype) == (kind, kind)
    assert (model.turns.tolist(), model.phase.tolist()) == ([1j, 2 + 1j], [3j])


def test_only_fp16_scales_losses_and_keeps_its_scale():
    loss = torch.tensor(2.0)
    for name in ("fp32", "fp64", "bf16"):
        assert Precision(name, CPU).scale(loss) is loss
        assert Precision(name, CPU).scaler is None
    first, second = Precision("fp16", CPU), Precision("fp16", CPU)
    assert first.scale(loss) > loss
    assert first.scaler is not None
    first.scaler.update(new_scale=8.0)
    assert second.scaler is not None
    second.scaler.load_state_dict(first.scaler.state_dict())
    assert second.scale(loss) == 16.0


def test_an_unknown_precision_is_refused_with_the_names():
    with pytest.raises(ConfigError, match=r"fp8.*fp32, fp64, bf16, fp16"):
        Precision("fp8", CPU)
