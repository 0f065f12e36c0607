"""Modules that compute their activations again: whatever their arguments, however often, under autocast and a compiler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvdtrain.errors import ConfigError, TrainingError
from hvdtrain.training.activation_checkpointing import checkpoint_activations
from hvdtrain.training.compiling import compile_module

POLICIES = ["full", "selective"]


class Twice(nn.Module):
    """Calls one block twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=None), nn.GELU(), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def numbers(model: nn.Module, *, autocast: bool = False) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(torch.randn(5, 3)).float().square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_module_that_is_called_twice_gives_the_same_numbers(policy: str, autocast: bool) -> None:
    model = Twice()
    checkpoint_activations(model, "block", policy=policy)
    bound = 0.05 if autocast else 1e-6  # the casts of a parameter are added up in another order
    for own, plain in zip(numbers(model, autocast=autocast), numbers(Twice(), autocast=autocast), strict=True):
        torch.testing.assert_close(own, plain, rtol=bound, atol=bound)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler, of its own doing
@pytest.mark.parametrize("policy", POLICIES)
def test_a_compiled_model_gives_the_same_numbers(policy: str) -> None:
    model = Twice()
    checkpoint_activations(model, "block", policy=policy)
    compile_module(model, {"backend": "aot_eager"})
    for own, plain in zip(numbers(model), numbers(Twice()), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6)


class Masked(nn.Module):
    """Shows in its output which numbers its dropout has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.ones(64)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout((self.weight * x).square())


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", ["aot_eager", "eager", "eager_noexcept"])
def test_a_compiled_backward_pass_has_the_masks_of_the_forward_pass_or_is_refused(backend: str, policy: str) -> None:
    model = nn.Sequential(Masked())
    checkpoint_activations(model, "0", policy=policy)
    if backend != "aot_eager":
        with pytest.raises(ConfigError, match=f"backend '{backend}' compiles no backward pass"):
            compile_module(model, {"backend": backend})
        return
    compile_module(model, {"backend": backend})
    output = model(torch.ones(64))
    output.sum().backward()
    assert torch.equal(model[0].weight.grad, 2 * output.detach())


class Named(nn.Module):
    """Has arguments with the names of `torch.utils.checkpoint.checkpoint`'s own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, *, function: float = 1.0, debug: float = 1.0, use_reentrant: float = 1.0) -> Tensor:
        return self.weight * x * function * debug * use_reentrant


@pytest.mark.parametrize("compiled", [False, True])
def test_arguments_may_have_any_name(compiled: bool) -> None:
    inner = Named()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return self.inner(x=x, function=2.0, debug=3.0, use_reentrant=5.0)

    model = Outer()
    checkpoint_activations(model, "inner")
    if compiled:
        compile_module(model, {"backend": "aot_eager"})
    output = model(torch.ones(3))
    output.sum().backward()
    assert output.tolist() == [30.0] * 3
    assert inner.weight.grad is not None
    assert inner.weight.grad.tolist() == [30.0] * 3


def block() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Tanh(), nn.Linear(3, 3))
    return nn.Sequential(inner, nn.Linear(3, 1))


def test_a_graph_that_is_kept_is_computed_again_each_time() -> None:
    models = [block(), block()]
    checkpoint_activations(models[0], "0")
    for model in models:
        torch.manual_seed(1)
        loss = model(torch.randn(5, 3)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for own, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(own.grad, plain.grad)
    assert all(map(torch.equal, models[0].buffers(), models[1].buffers()))


def halve(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


@pytest.mark.parametrize("change", [halve, nn.Module.eval])
def test_what_has_changed_since_the_forward_pass_is_not_computed_with(change: Any) -> None:
    model = block()
    checkpoint_activations(model, "0")
    loss = model(torch.randn(5, 3)).sum()
    change(model[0])
    with pytest.raises(TrainingError, match=r"'0'.* changed between its forward pass and the backward pass"):
        loss.backward()


def test_statistics_that_are_used_may_not_change_either() -> None:
    model = block().eval()
    checkpoint_activations(model, "0")
    loss = model(torch.randn(5, 3)).sum()
    model[0][1].running_mean.add_(1)  # type: ignore[index,operator,union-attr]
    with pytest.raises(TrainingError, match="changed between"):
        loss.backward()


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(3, 3)
        self.layers = nn.ModuleList([shared, nn.Linear(3, 3)])
        self.head = shared

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[1](self.layers[0](x)))


def test_a_container_that_is_never_called_is_not_taken_for_its_modules() -> None:
    assert checkpoint_activations(Layers(), ".*") == ["layers.0", "layers.1"]
    with pytest.raises(ConfigError, match=r"'layers' is a ModuleList.*'layers\[.\]\[\^.\]\+' does"):
        checkpoint_activations(Layers(), "layers")
    assert checkpoint_activations(Layers(), "layers[.][^.]+") == ["layers.0", "layers.1"]


def test_a_projection_that_attention_never_calls_is_not_taken() -> None:
    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16)

    with pytest.raises(ConfigError, match=r"'self_attn.out_proj' is never called.* name 'self_attn'"):
        checkpoint_activations(layer(), "self_attn[.]out_proj")
    assert checkpoint_activations(layer(), ".*(out_proj|linear1)") == ["linear1"]
    assert checkpoint_activations(layer(), "self_attn.*") == ["self_attn"]
    with pytest.raises(ConfigError, match="'out_proj' is never called"):
        checkpoint_activations(nn.MultiheadAttention(8, 2), "out_proj")


def test_a_module_has_each_of_its_names() -> None:
    model = Layers()
    assert checkpoint_activations(model, "head") == ["head"]
    with pytest.raises(ConfigError, match="already"):
        checkpoint_activations(copy.deepcopy(model), "layers.0")
