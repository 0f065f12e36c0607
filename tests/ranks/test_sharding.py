"""Device meshes, functional collectives, DTensors and FSDP2 over the group, on models and converters that torch's wheel has for its own tests."""

from __future__ import annotations

import copy
import itertools
import unittest
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn

pytest.importorskip("torch.distributed.tensor")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal import common_fsdp as theirs
    from torch.testing._internal.distributed._tensor.common_dtensor import DTensorConverter


@pytest.fixture(scope="module")
def mesh(world):
    return init_device_mesh("cpu", (dist.get_world_size(),))


@pytest.fixture(scope="module")
def grid(world):
    """Two dimensions, where the number of ranks is even."""
    size = dist.get_world_size()
    rows = 2 if size % 2 == 0 else 1
    return init_device_mesh("cpu", (rows, size // rows), mesh_dim_names=("rows", "columns"))


def test_functional_collectives_are_the_plain_ones(mesh, rank, size):
    x = torch.arange(4.0 * size).reshape(2 * size, 2) + rank
    everyone = [torch.arange(4.0 * size).reshape(2 * size, 2) + other for other in range(size)]
    total = torch.stack(everyone).sum(0)
    assert torch.equal(functional.all_reduce(x, "sum", mesh), total)
    assert torch.equal(functional.all_gather_tensor(x, 0, mesh), torch.cat(everyone))
    assert torch.equal(functional.all_gather_tensor(x, 1, mesh), torch.cat(everyone, 1))
    assert torch.equal(functional.reduce_scatter_tensor(x, "sum", 0, mesh), total[2 * rank : 2 * rank + 2])
    assert torch.equal(functional.broadcast(x, size - 1, mesh), everyone[-1])
    swapped = functional.all_to_all_single(x, None, None, mesh)
    assert torch.equal(swapped, torch.cat([other[2 * rank : 2 * rank + 2] for other in everyone]))
    for found, whole in zip(
        functional.all_reduce_coalesced([x, x.int()], "max", mesh), (everyone[-1], everyone[-1].int()), strict=True
    ):
        assert torch.equal(found, whole)
    for found, factor in zip(functional.all_gather_into_tensor_coalesced([x, 2 * x], mesh), (1, 2), strict=True):
        assert torch.equal(found, factor * torch.cat(everyone))
    (part,) = functional.reduce_scatter_tensor_coalesced([x], "sum", [0], mesh)
    assert torch.equal(part, total[2 * rank : 2 * rank + 2])
    y = x.clone().requires_grad_()
    functional.all_gather_tensor_autograd(y, 0, mesh).square().sum().backward()
    assert torch.equal(y.grad, 2 * size * x)


def test_the_parts_of_a_mesh_are_groups_of_their_own(grid, rank):
    for dim in ("rows", "columns"):
        group = grid[dim].get_group()
        members = dist.get_process_group_ranks(group)
        assert rank in members
        found = functional.all_reduce(torch.tensor(float(rank)), "sum", grid[dim])
        assert float(found) == sum(members)
    assert list(grid.get_coordinate()) == [rank // grid.shape[1], rank % grid.shape[1]]


PLACEMENTS = [Replicate(), Shard(0), Shard(1), Partial("sum"), Partial("avg")]


@pytest.mark.parametrize("shape", [(7, 5), (8, 12), (1, 3)])
@pytest.mark.parametrize(("before", "after"), list(itertools.product(PLACEMENTS, PLACEMENTS[:3])))
def test_a_tensor_is_the_same_however_it_is_laid_over_the_ranks(mesh, rank, size, shape, before, after):
    whole = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if before.is_partial():
        part = whole if before.reduce_op == "avg" else whole * (2.0 * (rank + 1) / (size * (size + 1)))
        laid = DTensor.from_local(part, mesh, [before])
    else:
        laid = distribute_tensor(whole if rank == 0 else torch.zeros_like(whole), mesh, [before])
    moved = laid.redistribute(mesh, [after])
    assert moved.placements == (after,)
    torch.testing.assert_close(moved.full_tensor(), whole, rtol=0, atol=1e-13)


def test_a_tensor_is_laid_over_two_dimensions(grid):
    whole = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for first, second in itertools.product(PLACEMENTS[:3], PLACEMENTS[:3]):
        laid = distribute_tensor(whole, grid, [first, second])
        assert torch.equal(laid.full_tensor(), whole)
        assert torch.equal(laid.redistribute(grid, [second, first]).full_tensor(), whole)


OPERATIONS = {
    "mm": lambda a, b: a @ b.t(),
    "addmm": lambda a, b: torch.addmm(a[:, :1], a, b.t()),
    "softmax": lambda a, b: (a * b).softmax(1),
    "layer_norm": lambda a, b: nn.functional.layer_norm(a + b, a.shape[1:]),
    "gelu": lambda a, b: nn.functional.gelu(a) + b,
    "mean": lambda a, b: (a - b).mean(0),
    "max": lambda a, b: torch.maximum(a, b).amax(1),
    "cat": lambda a, b: torch.cat([a, b], 1),
    "norm": lambda a, b: torch.linalg.vector_norm(a) * b,
    "transpose": lambda a, b: a.t().contiguous() + b.t(),
    "cumsum": lambda a, b: a.cumsum(1) * b,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_what_it_gives_of_whole_tensors(mesh, size, name):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(4 * size, 4 * size, dtype=torch.float64, generator=generator) for _ in range(2))
    expected = OPERATIONS[name](a, b)
    converter = DTensorConverter(mesh, (a, b), {})
    for args, _ in converter:
        found = OPERATIONS[name](*args)
        torch.testing.assert_close(found.full_tensor(), expected, rtol=0, atol=1e-12)
    assert converter.successful()
    assert converter.hit == 18  # two tensors, each in three ways


case = unittest.TestCase()
case.assertEqual = lambda first, second: (  # their own compares tensors so
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6) if isinstance(first, torch.Tensor) else None
)

MODELS = {
    "MLP": (lambda: theirs.MLP(5), (5,), ["in_proj", "out_proj"]),
    "MLP with a buffer": (lambda: theirs.MLP(6, with_buffer=True), (6,), ["in_proj", "out_proj"]),
    "stack": (lambda: theirs.MLPStack(4), (4,), ["0", "1", "2"]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_fully_sharded_models_of_theirs_train_as_whole_ones(mesh, grid, rank, name, reshard, dimensions):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    make, shape, units = MODELS[name]
    torch.manual_seed(7)
    whole = make()
    cut = copy.deepcopy(whole)
    over = mesh if dimensions == 1 else grid  # of two dimensions: cut over one, copied over the other
    for unit in (*(cut.get_submodule(name) for name in units), cut):
        fsdp.fully_shard(unit, mesh=over, reshard_after_forward=reshard)
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (whole, cut)]
    for step in range(4):
        torch.manual_seed(100 * step + rank)
        x = torch.randn(3, *shape)
        for model, optimizer in zip((whole, cut), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
        for parameter in whole.parameters():
            dist.all_reduce(parameter.grad, dist.ReduceOp.AVG)
        if dimensions == 1:
            theirs.check_sharded_parity(case, whole, cut)
        for optimizer in optimizers:
            optimizer.step()
    for parameter, part in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(part.full_tensor(), parameter, rtol=1e-5, atol=1e-6)


def test_their_stack_is_cut_by_features_and_over_the_ranks(grid, rank, size):
    if size % 2:
        return
    torch.manual_seed(7)
    whole = theirs.MLPStack(8)
    cut = copy.deepcopy(whole).parallelize(grid["columns"], grid["rows"], use_activation_checkpointing=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, cut)]
    for step in range(3):
        torch.manual_seed(100 * step + grid.get_coordinate()[0])
        x = torch.randn(2, 8)
        for model, optimizer in zip((whole, cut), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            for parameter in model.parameters() if model is whole else ():
                dist.all_reduce(parameter.grad, dist.ReduceOp.AVG)
            optimizer.step()
    for (name, parameter), part in zip(whole.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(part.full_tensor(), parameter, rtol=1e-4, atol=1e-5, msg=name)
