"""Layers that are spread over the ranks are the layers that they stand for."""

import copy
import pickle

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.errors import ConfigError, TrainingError

pytestmark = pytest.mark.feature("wide layers")

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def pair(backend, in_features, out_features, **options):
    """The partitioned layer and the dense one, from one seed."""
    torch.manual_seed(7)
    dense = nn.Linear(in_features, out_features, dtype=torch.float64, **options).to(backend.device)
    torch.manual_seed(7)
    return hvdtrain.nn.FeaturePartitionedLinear(
        in_features, out_features, backend=backend, dtype=torch.float64, **options
    ), dense


def batch(backend, *shape):
    return (
        torch.sin(torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64))
        .reshape(shape)
        .to(backend.device)
    )


def bag(backend, rows, width):
    dense = batch(backend, rows, width)
    return torch.where(dense > 0.6, dense, 0)


def check_whole(layer, dense):
    for name, value in layer.full_state_dict().items():
        torch.testing.assert_close(value, dense.state_dict()[name], msg=name, **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("in_features", [1, 2, 7, 12])
def test_it_begins_trains_and_answers_as_the_dense_layer_does(backend, in_features, bias):
    layer, dense = pair(backend, in_features, 3, bias=bias)
    columns = slice(layer.columns.start, layer.columns.stop)
    assert torch.equal(layer.weight, dense.weight[:, columns])
    check_whole(layer, dense)
    assert backend.all_reduce(torch.tensor(layer.weight.numel())) == dense.weight.numel()
    x = batch(backend, 5, in_features)
    steps = [torch.optim.Adam(part.parameters(), lr=0.1) for part in (layer, dense)]
    for given in (x, x[:, columns], x.reshape(5, 1, in_features)):
        outputs = layer(given).reshape(5, 3), dense(x)
        torch.testing.assert_close(*outputs, **CLOSE)
        for output, optimizer in zip(outputs, steps, strict=True):
            optimizer.zero_grad()
            output.square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(layer.weight.grad, dense.weight.grad[:, columns], **CLOSE)
    check_whole(layer, dense)


def test_layers_below_and_above_are_trained_alike_on_every_rank(backend):
    wide, dense = pair(backend, 9, 4)
    torch.manual_seed(1)
    below, above = nn.Linear(2, 9, dtype=torch.float64), nn.Linear(4, 1, dtype=torch.float64)
    spread = nn.Sequential(copy.deepcopy(below), nn.Tanh(), wide, nn.Tanh(), copy.deepcopy(above)).to(backend.device)
    whole = nn.Sequential(below, nn.Tanh(), dense, nn.Tanh(), above).to(backend.device)
    x = batch(backend, 6, 2)
    for model in (spread, whole):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for index in (0, 4):
        for mine, theirs in zip(spread[index].parameters(), whole[index].parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
            torch.testing.assert_close(mine, theirs, **CLOSE)
    check_whole(wide, dense)


def test_a_gradients_gradient_is_the_dense_layers(backend):
    found = []
    layer, dense = pair(backend, 5, 3)
    for part in (layer, dense):
        x = batch(backend, 4, 5).requires_grad_()
        (slope,) = torch.autograd.grad(part(x).tanh().square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append((slope, x.grad, part.weight.grad, part.bias.grad))
    columns = slice(layer.columns.start, layer.columns.stop)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs if mine.shape == theirs.shape else theirs[:, columns], **CLOSE)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_inputs_whole_or_this_ranks(backend, layout):
    layer, dense = pair(backend, 11, 3)
    x = bag(backend, 6, 11)
    dense(x).square().sum().backward()
    columns = slice(layer.columns.start, layer.columns.stop)
    for given in (x, x[:, columns]):
        layer.zero_grad()
        output = layer(given.to_sparse(layout=layout))
        output.square().sum().backward()
        torch.testing.assert_close(output, dense(x), **CLOSE)
        torch.testing.assert_close(layer.weight.grad, dense.weight.grad[:, columns], **CLOSE)
    with pytest.raises(TrainingError, match="require no grad"):
        layer(x.to_sparse(layout=layout).requires_grad_())


def test_a_whole_layers_state_goes_in_at_any_number_of_ranks(backend):
    layer, dense = pair(backend, 10, 2)
    torch.manual_seed(3)
    other = nn.Linear(10, 2, dtype=torch.float64).to(backend.device)
    layer.load_full_state_dict(other.state_dict())
    check_whole(layer, other)
    dense.load_state_dict(layer.full_state_dict())
    assert torch.equal(dense.weight, other.weight)
    with pytest.raises(ConfigError, match=r"a whole layer has .*\(2, 10\).*got .*\(2, 9\)"):
        layer.load_full_state_dict(nn.Linear(9, 2).state_dict())


def test_what_it_cannot_be_is_refused(backend):
    layer, _ = pair(backend, 8, 2)
    for refused in (
        lambda: backend.replicate(nn.Sequential(nn.Linear(4, 8), layer).to(backend.device)),
        lambda: hvdtrain.Trainer(
            backend,
            layer,
            torch.optim.SGD(layer.parameters(), lr=0.1),
            loss=nn.functional.mse_loss,
            precision="fp64",
        ),
    ):
        with pytest.raises(
            ConfigError, match=r"is a FeaturePartitionedLinear: .*the same batch.*without replicate\(\)"
        ):
            refused()
    with pytest.raises(TrainingError, match=r"expected 8 input features.*got shape \(3, 9\)"):
        layer(batch(backend, 3, 9))
    with pytest.raises(ConfigError, match="out_features must be at least 1, got 0"):
        hvdtrain.nn.FeaturePartitionedLinear(3, 0, backend=backend)
    with pytest.raises(TrainingError, match=r"was unpickled.*full_state_dict"):
        pickle.loads(pickle.dumps(layer))(batch(backend, 3, 8))


@pytest.mark.parametrize("sparse", [False, True])
def test_another_batch_on_each_rank_is_refused_on_every_rank(backend, sparse):
    if backend.world_size == 1:
        pair(backend, 8, 2)[0](batch(backend, 3, 8))
        return
    layer, _ = pair(backend, 8, 2)
    for x in (bag(backend, 4, 8).roll(backend.rank, 0), bag(backend, 4 + backend.rank, 8)):
        with pytest.raises(TrainingError, match=r"ranks 0 and 1 give .* different batches.*backend\.loader"):
            layer(x.to_sparse() if sparse else x)
    assert layer(bag(backend, 4, 8)).shape == (4, 2)
