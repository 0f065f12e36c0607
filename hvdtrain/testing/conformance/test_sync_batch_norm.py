"""Batch normalisation over all ranks, against one process with the whole batch (float64, 1e-10)."""

import copy
import pickle

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import TrainingError
from hvdtrain.training.compiling import compile_module

pytestmark = pytest.mark.feature("batch normalisation")

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
SHAPES = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}


def model_of(dims, **settings):
    torch.manual_seed(dims)
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    first = nn.Conv1d if dims == 1 else nn.Conv2d if dims == 2 else nn.Conv3d
    return nn.Sequential(first(2, 3, 1), kind(3, **settings), nn.Tanh(), first(3, 2, 1), kind(2, **settings)).double()


def samples(dims, begin, end):
    values = torch.sin(torch.arange(begin * 1000, end * 1000, dtype=torch.float64)).reshape(end - begin, 1000)
    size = 2 * torch.Size(SHAPES[dims]).numel()
    return 100 + values[:, :size].reshape(
        end - begin, 2, *SHAPES[dims]
    )  # a mean far from zero: variance must not suffer


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str
)
def test_statistics_and_gradients_are_those_of_the_whole_batch(backend, dims, settings):
    rank, n = backend.rank, backend.world_size
    total = sum(range(1, n + 1))
    alone = model_of(dims, **settings)
    model = hvdtrain.convert_sync_batch_norm(copy.deepcopy(alone), backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replica = backend.replicate(model, optimizer)
    reference = torch.optim.SGD(alone.parameters(), lr=0.1)
    begin = sum(range(1, rank + 1))
    for step in range(3):
        x = (samples(dims, begin, begin + rank + 1) + step).requires_grad_()
        whole = (samples(dims, 0, total) + step).requires_grad_()
        replica.backward(replica.model(x).square().mean(), samples=rank + 1, total=total)
        replica.reduce_gradients()
        alone(whole).square().mean().backward()
        for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)
        replica.step()
        reference.step()
        reference.zero_grad()
        for (name, mine), theirs in zip(model.named_buffers(), alone.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, msg=name, **CLOSE)
    assert list(model.state_dict()) == list(alone.state_dict())
    model.eval()
    alone.eval()
    if settings.get("track_running_stats", True):
        torch.testing.assert_close(model(samples(dims, rank, rank + 1)), alone(samples(dims, rank, rank + 1)), **CLOSE)


def test_a_rank_with_an_empty_batch_takes_part(backend):
    n = backend.world_size
    alone = model_of(1)
    model = hvdtrain.convert_sync_batch_norm(copy.deepcopy(alone), backend)
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x = samples(1, 0, 4) if backend.rank == n - 1 else samples(1, 0, 0)
    replica.backward(replica.model(x).square().mean(), samples=len(x), total=4)
    replica.reduce_gradients()
    alone(samples(1, 0, 4)).square().mean().backward()
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)


def test_a_gradient_that_would_be_differentiated_again_is_refused(backend):
    layer = hvdtrain.convert_sync_batch_norm(nn.BatchNorm1d(3), backend)
    x = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(("length", "global_batch_size"), [(13, 4), (6, 5), (3, 3), (9, 8)])
def test_the_trainer_keeps_ranks_in_step_and_trains_as_one_process_does(backend, reference, length, global_batch_size):
    def trained(where):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
        model = hvdtrain.convert_sync_batch_norm(model, where)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = hvdtrain.Trainer(where, model, optimizer, loss=nn.functional.mse_loss, precision="fp64")
        x = torch.sin(torch.arange(length * 4, dtype=torch.float64)).reshape(length, 4)
        data = ArrayDataset(x, x[:, :2].square())
        try:
            trainer.fit(data, epochs=2, global_batch_size=global_batch_size)
        except ValueError as error:
            return str(error)
        return model.state_dict()

    mine, alone = trained(backend), trained(reference)
    if isinstance(alone, str):  # a last batch of one sample has no variance, wherever it is
        assert mine == alone
        return
    for name, value in alone.items():
        torch.testing.assert_close(mine[name], value, msg=name, **CLOSE)


def test_micro_batches_keep_ranks_in_step_too(backend):
    torch.manual_seed(0)
    model = hvdtrain.convert_sync_batch_norm(
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), backend
    )
    trainer = hvdtrain.Trainer(
        backend, model, torch.optim.SGD(model.parameters(), lr=0.1), loss=nn.functional.mse_loss, accumulate=2
    )
    n = backend.world_size
    # In the last batch of three and more ranks one makes a single pass, the others two, of two samples at least.
    count = 4 * n + (2 * n - 1 if n > 2 else 4)
    data = ArrayDataset(torch.randn(count, 2), torch.randn(count, 1))
    trainer.fit(data, epochs=2, global_batch_size=4 * backend.world_size)
    statistics = backend.all_gather_object(model[1].running_mean.tolist())
    assert all(one == statistics[0] for one in statistics)


def test_a_copy_works_and_a_pickle_says_what_it_lacks(backend):
    model = hvdtrain.convert_sync_batch_norm(model_of(1), backend)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(samples(1, 0, 2)), model(samples(1, 0, 2)))
    loaded = pickle.loads(pickle.dumps(model))
    loaded.eval()
    loaded(samples(1, 0, 1))
    loaded.train()
    with pytest.raises(TrainingError, match="convert_sync_batch_norm"):
        loaded(samples(1, 0, 2))


def test_a_layer_alone_is_converted_too(backend):
    layer = nn.BatchNorm2d(3)
    converted = hvdtrain.convert_sync_batch_norm(layer, backend)
    assert converted is not layer
    assert converted.weight is layer.weight
    assert hvdtrain.convert_sync_batch_norm(converted, backend) is converted


def compiled_here(model):
    compile_module(model, {"backend": "eager"})
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def wrapped(model):
    return torch.compile(model, backend="eager")


def called_in_a_function(model):
    def call(inputs):
        return model(inputs)

    return torch.compile(call, backend="eager")


@pytest.mark.costly(1)
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # the compiler's own look at it
@pytest.mark.parametrize("by", [compiled_here, compiled_in_place, wrapped, called_in_a_function])
def test_a_compiled_model_normalises_over_all_ranks_too(backend, by):
    torch._dynamo.reset()
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    plain = hvdtrain.convert_sync_batch_norm(layers, backend)
    compiled = copy.deepcopy(plain)
    inputs = torch.randn(5 + backend.rank, 4)
    for model in (plain, by(compiled)):
        model(inputs).square().mean().backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert torch.equal(plain[1].running_mean, compiled[1].running_mean)
    torch._dynamo.reset()
