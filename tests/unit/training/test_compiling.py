"""What is not compiled is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError
from hvdtrain.training.compiling import CompiledForward, compile_model, compile_module

DATA = ArrayDataset(torch.ones(8, 3), torch.ones(8, 1))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))


class Task:
    def __init__(self, whole: bool) -> None:
        self._whole = whole

    def loss(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        outputs = model(x) if self._whole else model.head(model.encode(x))
        return nn.functional.mse_loss(outputs, y)

    def metrics(self, model: Any, batch: Any) -> dict[str, Tensor]:
        return {"loss": self.loss(model, batch)}


@pytest.mark.parametrize("whole", [True, False])
def test_a_loss_that_calls_parts_of_the_model_alone_is_refused(alone: Any, whole: bool) -> None:
    model = Parts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = hvdtrain.Trainer(alone, model, optimizer, task=Task(whole), compile={"backend": "eager"})
    if whole:
        assert trainer.fit(DATA, global_batch_size=4).steps == 2
        return
    with pytest.raises(ConfigError, match=r"the loss never calls the Parts itself"):
        trainer.fit(DATA, global_batch_size=4)
    assert trainer.position.steps == 0


def compiled_in_place() -> nn.Module:
    model = Parts()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("make", [compiled_in_place, lambda: torch.compile(Parts(), backend="eager")])
def test_a_model_is_compiled_once(make: Any) -> None:
    with pytest.raises(ConfigError, match="compiled already"):
        compile_module(make())


def test_arguments_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match="a dictionary"):
        compile_module(Parts(), "max-autotune")  # type: ignore[arg-type]


def test_many_models_of_one_process_are_all_compiled() -> None:
    graphs = []
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        model = Parts()
        compile_module(model, {"backend": lambda graph, _: graphs.append(graph) or graph.forward})
        model(torch.ones(2, 3))
    assert len(graphs) == torch._dynamo.config.recompile_limit + 2


def test_a_model_whose_forward_is_replaced_is_not_copied_to_several_gpus(alone: Any) -> None:
    model = nn.Sequential(Parts(), nn.Linear(1, 1))
    replica = alone.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    replica.split_over_gpus()
    hvdtrain.checkpoint_activations(model, "0")
    with pytest.raises(ConfigError, match=r"forward.. of '0' has been replaced"):
        replica.split_over_gpus()


@pytest.mark.parametrize(
    ("pattern", "compiled"),
    [(None, [""]), (r"\d", ["0", "1", "2"]), (r"\d|1[.]0", ["0", "1.0", "2"]), (r"1|1[.][01]", ["1.0", "1.1"])],
)
def test_of_modules_that_are_gathered_the_innermost_are_compiled(pattern: str | None, compiled: list[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    compile_model(model, {"backend": "eager"}, shard_modules=pattern)
    assert [name for name, part in model.named_modules() if isinstance(part.forward, CompiledForward)] == compiled
