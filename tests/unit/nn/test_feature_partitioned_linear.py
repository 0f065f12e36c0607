"""The partitioned layer against the dense one, for any number of features and ranks (threads of this process)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hvdtrain
from hvdtrain.backends.communicator import Communicator
from hvdtrain.errors import ConfigError, TrainingError
from hvdtrain.testing.threads import run_ranks


@settings(max_examples=40, deadline=None)
@given(
    world=st.integers(1, 5),
    in_features=st.integers(1, 9),
    out_features=st.integers(1, 3),
    rows=st.integers(0, 4),
    bias=st.booleans(),
    sparse=st.booleans(),
    cut=st.booleans(),
)
def test_outputs_gradients_and_state_are_the_dense_layers(
    world: int, in_features: int, out_features: int, rows: int, bias: bool, sparse: bool, cut: bool
) -> None:
    dense = nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64)
    x = torch.randn(rows, in_features, dtype=torch.float64).relu().requires_grad_(not sparse)
    dense(x).tanh().square().sum().backward()

    def rank(communicator: Communicator) -> tuple[Any, ...]:
        layer = hvdtrain.nn.FeaturePartitionedLinear(
            in_features, out_features, backend=communicator, bias=bias, dtype=torch.float64
        )
        layer.load_full_state_dict(dense.state_dict())
        mine = x.to_sparse() if sparse else x.detach().requires_grad_()
        output = layer(mine[:, layer.columns.start : layer.columns.stop] if cut and not sparse else mine)
        output.tanh().square().sum().backward()
        gradients = [None if p is None else p.grad for p in (layer.weight, layer.bias)]
        return layer.columns, output.detach(), gradients, mine.grad, layer.full_state_dict()

    def close(mine: Tensor | None, theirs: Tensor | None) -> None:
        assert mine is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)

    columns = []
    for own, output, gradients, slope, state in run_ranks(world, rank):
        columns += list(own)
        close(output, dense(x).detach())
        close(gradients[0], dense.weight.grad[:, own.start : own.stop])  # type: ignore[index]
        if bias:
            close(gradients[1], dense.bias.grad)
        if cut and not sparse:
            close(slope[:, own.start : own.stop], x.grad[:, own.start : own.stop])  # type: ignore[index]
        elif not sparse:
            close(slope, x.grad)
        assert all(torch.equal(state[name], value) for name, value in dense.state_dict().items())
    assert columns == list(range(in_features))


@pytest.mark.parametrize("sparse", [False, True])
def test_under_autocast_it_gives_what_the_dense_layer_gives(sparse: bool) -> None:
    x = torch.eye(4)
    dense = nn.Linear(4, 2)

    def rank(communicator: Communicator) -> Tensor:
        layer = hvdtrain.nn.FeaturePartitionedLinear(4, 2, backend=communicator)
        layer.load_full_state_dict(dense.state_dict())
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x.to_sparse() if sparse else x).detach()

    with torch.autocast("cpu", torch.bfloat16):
        expected = dense(x).detach()
    for output in run_ranks(2, rank):
        torch.testing.assert_close(output, expected.float() if sparse else expected, rtol=0.02, atol=0.02)


def test_a_part_of_the_state_goes_to_no_other_rank() -> None:
    def rank(communicator: Communicator) -> dict[str, Any]:
        model = nn.Sequential(hvdtrain.nn.FeaturePartitionedLinear(6, 2, backend=communicator))
        model.load_state_dict(model.state_dict())
        return model.state_dict()

    parts = run_ranks(2, rank)

    def other(communicator: Communicator) -> None:
        model = nn.Sequential(hvdtrain.nn.FeaturePartitionedLinear(6, 2, backend=communicator))
        model.load_state_dict(parts[0])

    with pytest.raises(ConfigError, match="of features 0:3 of 6, and this rank holds 3:6"):
        run_ranks(2, other)


def test_all_features_on_one_rank_and_its_own_on_another_are_refused() -> None:
    def rank(communicator: Communicator) -> None:
        layer = hvdtrain.nn.FeaturePartitionedLinear(4, 2, backend=communicator)
        x = torch.ones(3, 4)
        layer(x[:, layer.columns.start : layer.columns.stop] if communicator.wire.rank else x)

    with pytest.raises(TrainingError, match=r"some ranks give .* all 4 features, and others their own"):
        run_ranks(2, rank)
