"""The partitioned layer against the dense one, for any number of features and ranks (threads of this process)."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hvdtrain
from hvdtrain.backends.communicator import Communicator
from hvdtrain.testing.threads import run_ranks


@settings(max_examples=40, deadline=None)
@given(
    world=st.integers(1, 5),
    in_features=st.integers(1, 9),
    out_features=st.integers(1, 3),
    rows=st.integers(0, 4),
    bias=st.booleans(),
    sparse=st.booleans(),
)
def test_outputs_gradients_and_state_are_the_dense_layers(
    world: int, in_features: int, out_features: int, rows: int, bias: bool, sparse: bool
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
        output = layer(mine)
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
        if not sparse:
            close(slope, x.grad)
        assert all(torch.equal(state[name], value) for name, value in dense.state_dict().items())
    assert columns == list(range(in_features))
