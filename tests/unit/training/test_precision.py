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
        ("tf32", torch.float32, torch.float32),
        ("bf16-pure", torch.bfloat16, torch.bfloat16),
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


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "bf16-pure", "fp16"])
def test_a_model_of_float64_is_not_rounded_in_silence(name, kind):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.ones(2, 2, dtype=kind))
    with pytest.raises(
        ConfigError, match=f"float64 .'1.weight', 1 in all.*precision {name} would round; say precision='fp64'"
    ):
        Precision(name, CPU).prepare(model)
    assert model[1].weight.dtype == kind
    Precision("fp64", CPU).prepare(model)


def test_bf16_pure_has_no_complex_numbers():
    model = nn.Linear(2, 2)
    model.register_buffer("turns", torch.tensor([1j]))
    with pytest.raises(ConfigError, match="no complex numbers of bfloat16"):
        Precision("bf16-pure", CPU).prepare(model)


def _switches():
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):
        return cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    return cuda.allow_tf32, cudnn.allow_tf32


@pytest.mark.parametrize("name", ["fp32", "tf32"])
def test_tf32_is_set_for_a_gpu_and_set_back_also_after_an_error(name):
    before = _switches()
    inside = []

    def failing():
        inside.extend(_switches())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Precision(name, torch.device("cuda")).arithmetic():
        failing()
    assert _switches() == before
    assert (set(inside) <= {"tf32", True}) == (name == "tf32")


def test_tf32_on_a_cpu_says_that_it_is_float32_and_sets_nothing(caplog):
    before = _switches()
    with Precision("tf32", CPU).arithmetic():
        assert _switches() == before
    assert "on cpu it is fp32" in caplog.text


def test_images_lie_channels_last_and_the_argument_stays():
    batch = {"x": torch.ones(2, 3, 4, 5), "y": torch.ones(2, 3)}
    precision = Precision("bf16-pure", CPU, channels_last=True)
    cast = precision.cast(batch)
    assert cast["x"].is_contiguous(memory_format=torch.channels_last)
    assert cast["y"].dtype == torch.bfloat16
    assert batch["x"].is_contiguous()
    model = precision.prepare(nn.Conv2d(3, 4, 2))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ConfigError, match="leave it out"):
        precision.prepare(nn.Linear(3, 4))


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
    with pytest.raises(ConfigError, match=r"fp8.*fp32, tf32, fp64, bf16, bf16-pure, fp16"):
        Precision("fp8", CPU)
