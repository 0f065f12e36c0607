"""DistributedOptimizer, what is copied before training, and batch normalisation: against one process with the whole batch."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import hvdtrain.horovod as hvd


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def batches(size, steps):
    torch.manual_seed(7)
    return torch.randn(steps, size, 4, 6, dtype=torch.float64)


def loss_of(model, x):
    return model(x).square().mean()


def trained_alone(size, steps=4, passes=1, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)):
    model = make()
    optimizer = make_optimizer(model.parameters())
    for data in batches(size, steps * passes).split(passes):
        optimizer.zero_grad()
        sum(loss_of(model, whole.reshape(-1, 6)) for whole in data).backward()
        optimizer.step()
    return model


def assert_equal(model, expected, tolerance=1e-12):
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        ({}, 1e-12),
        ({"groups": 2}, 1e-12),
        ({"groups": "lists"}, 1e-12),
        ({"num_groups": 3}, 1e-12),
        ({"gradient_predivide_factor": 2.0}, 1e-12),
        ({"gradient_predivide_factor": 2.0, "groups": 1}, 1e-12),
        ({"compression": hvd.Compression.fp16}, 1e-2),
        ({"op": hvd.Average, "sparse_as_dense": True}, 1e-12),
        ({"process_set": hvd.global_process_set}, 1e-12),
    ],
    ids=str,
)
def test_it_steps_as_one_process_with_the_whole_batch(rank, size, arguments, tolerance):
    model = make(rank)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if arguments.get("groups") == "lists":
        arguments = {"groups": [list(model[0].parameters()), [model[4].bias]]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), **arguments)
    for data in batches(size, 4):
        optimizer.zero_grad()
        loss_of(model, data[rank]).backward()
        optimizer.step()
    assert_equal(model, trained_alone(size), tolerance)


@pytest.mark.parametrize("arguments", [{}, {"groups": 2}, {"compression": hvd.Compression.fp16}], ids=str)
def test_a_fused_optimizer_of_channels_last_weights_gets_gradients_that_lie_so(rank, size, arguments):
    torch.manual_seed(3)
    model = (
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 2, 2)).double().to(memory_format=torch.channels_last)
    )
    alone = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), **arguments)
    expected = torch.optim.AdamW(alone.parameters(), lr=0.01)
    for _ in range(3):
        whole = torch.randn(size, 2, 3, 6, 6, dtype=torch.float64)
        optimizer.zero_grad()
        loss_of(model, whole[rank].to(memory_format=torch.channels_last)).backward()
        optimizer.step()
        expected.zero_grad()
        loss_of(alone, whole.flatten(0, 1)).backward()
        expected.step()
    assert_equal(model, alone, 1e-3 if arguments.get("compression") else 1e-9)


class Halved:
    @staticmethod
    def compress(tensor):
        return tensor / 2, tensor.dtype

    @staticmethod
    def decompress(tensor, ctx):
        return (tensor * 2).to(ctx)


def test_a_compressor_of_the_users_own_and_a_sum(rank, size):
    model = make()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1 / size, momentum=0.9), compression=Halved, op=hvd.Sum
    )
    for data in batches(size, 4):
        optimizer.zero_grad()
        loss_of(model, data[rank]).backward()
        optimizer.step()
    assert_equal(model, trained_alone(size))


def test_several_backward_passes_a_step(rank, size):
    model = make()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model.named_parameters(), backward_passes_per_step=2
    )
    for data in batches(size, 8).split(2):
        optimizer.zero_grad()
        for part in data:
            loss_of(model, part[rank]).backward()
        optimizer.step()
    assert_equal(model, trained_alone(size, passes=2))
    loss_of(model, data[0][rank]).backward()
    loss_of(model, data[0][rank]).backward()
    if size > 1:
        with pytest.raises(AssertionError, match="backward_passes_per_step=2"):
            loss_of(model, data[0][rank]).backward()
        with pytest.raises(AssertionError, match="before optimizer"):
            optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.set_backward_passes_per_step(1)
    loss_of(model, data[0][rank]).backward()
    optimizer.step()


def test_clipping_sees_the_norm_of_the_whole(rank, size):
    model, alone = make(), make()
    (data,) = batches(size, 1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    loss_of(model, data[rank]).backward()
    optimizer.synchronize()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with optimizer.skip_synchronize():
        optimizer.step()
    loss_of(alone, data.reshape(-1, 6)).backward()
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(alone.parameters(), 0.01).item(), abs=1e-12)
    optimizer.zero_grad()
    loss_of(model, data[rank]).backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="without optimizer.skip_synchronize"):
        optimizer.step()


@pytest.mark.parametrize("scaler_first", [False, True])
def test_an_infinity_on_one_rank_skips_the_step_of_all(rank, size, scaler_first):
    model = make()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model)
    (data,) = batches(size, 1)
    for turn in range(2):
        optimizer.zero_grad()
        loss = loss_of(model, data[rank]) * (float("inf") if turn == 0 and rank == size - 1 else 1.0)
        scaler.scale(loss).backward()
        if scaler_first:
            scaler.step(optimizer)
        else:
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        scaler.update()
        if turn == 0:
            assert_equal(model, before)
            assert scaler.get_scale() == 2.0
    loss_of(before, data.reshape(-1, 6)).backward()
    torch.optim.SGD(before.parameters(), lr=0.1).step()
    assert_equal(model, before)


def test_a_closure_is_exchanged_each_time(rank, size):
    def run(x, wrap):
        model = make()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
        optimizer = wrap(optimizer)

        def closure():
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss if wrap is keep else hvd.allreduce(loss.detach(), name="loss")

        for _ in range(2):
            optimizer.step(closure)
        return model

    def keep(optimizer):
        return optimizer

    (data,) = batches(size, 1)
    assert_equal(run(data[rank], hvd.DistributedOptimizer), run(data.reshape(-1, 6), keep), 1e-9)


def test_ranks_that_use_different_parts(rank, size):
    model = make()
    extra = nn.Linear(6, 1).double()
    everything = nn.ModuleList([model, extra])
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(everything.parameters(), lr=0.1), everything.named_parameters()
    )
    before = extra.weight.detach().clone()
    x = torch.ones(2, 6, dtype=torch.float64)
    (extra(x) if rank == 0 else model(x)).sum().backward()
    optimizer.step()
    assert torch.allclose(extra.weight, before - 0.1 * 2 / size)


def test_sparse_gradients(rank, size):
    for as_dense in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(10, 3, sparse=True)
        head = nn.Linear(3, 1)
        module = nn.ModuleList([table, head])
        start = table.weight.detach().clone()
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(module.parameters(), lr=1.0), module.named_parameters(), sparse_as_dense=as_dense
        )
        for _ in range(2):
            optimizer.zero_grad()
            table(torch.tensor([rank, 5])).sum().backward(retain_graph=False)
            optimizer.step()
        expected = start.clone()
        for r in range(size):
            expected[r] -= 2.0 / size
        expected[5] -= 2.0
        assert torch.allclose(table.weight, expected, atol=1e-6)


def test_ranks_with_fewer_steps_join(rank, size):
    model = make()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    for _ in range(2 + rank):
        optimizer.zero_grad()
        loss_of(model, torch.ones(2, 6, dtype=torch.float64)).backward()
        optimizer.step()
    last = hvd.join()
    assert last == size - 1
    hvd.broadcast_parameters(
        model.state_dict(), root_rank=last
    )  # those that joined early have old weights, as with Horovod
    states = hvd.allgather_object([p.tolist() for p in model.parameters()])
    assert all(state == states[0] for state in states)


def test_a_step_that_was_skipped_leaves_nothing_behind(rank, size):
    model = make()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for turn, data in enumerate(batches(size, 3)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, data[rank]) * (float("inf") if turn < 2 and rank == 0 else 1.0)).backward()
        if turn == 0:  # clips, in this step alone
            optimizer.synchronize()
            scaler.unscale_(optimizer)
        with optimizer.skip_synchronize() if turn == 0 else nullcontext():
            scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 1.0
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert torch.equal(hvd.broadcast(weights, 0), weights)


@pytest.mark.parametrize("by_inner", [False, True])
@pytest.mark.parametrize("op", [hvd.Average, hvd.Adasum])
def test_a_state_that_is_loaded_reaches_the_optimizer_inside_and_the_one_around_it(size, by_inner, op):
    if op == hvd.Adasum and size & (size - 1):
        pytest.skip("powers of two")
    model = make()
    inner = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9)
    loss_of(model, torch.ones(2, 6, dtype=torch.float64)).backward()
    inner.step()
    inner.zero_grad()
    saved = copy.deepcopy(inner.state_dict())
    inner.state.clear()
    schedule = torch.optim.lr_scheduler.StepLR(inner, step_size=1)
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters(), op=op)
    (inner if by_inner else optimizer).load_state_dict(saved)
    assert len(optimizer.state) == 6
    loss_of(model, torch.ones(2, 6, dtype=torch.float64)).backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.04)


def test_the_optimizer_stays_what_it_was(rank, size):
    model = make()
    inner = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    loss_of(model, torch.ones(2, 6, dtype=torch.float64)).backward()
    inner.step()
    schedule = torch.optim.lr_scheduler.StepLR(inner, step_size=1)
    optimizer = hvd.DistributedOptimizer(inner, model.named_parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.state is inner.state
    assert optimizer.defaults["lr"] == 0.3
    assert all("momentum_buffer" in state for state in optimizer.state.values())
    inner.zero_grad()
    loss_of(model, torch.ones(2, 6, dtype=torch.float64)).backward()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.03)
    again = pickle.loads(pickle.dumps(optimizer))
    assert type(again) is torch.optim.SGD
    with pytest.raises(ValueError, match="wrap an optimizer once"):
        hvd.DistributedOptimizer(optimizer)
    added = nn.Linear(1, 1).double()
    with torch.no_grad():
        added.weight.fill_(1.0)
        added.bias.fill_(0.0)
    optimizer.add_param_group({"params": list(added.parameters())})
    optimizer.zero_grad()
    (added(torch.ones(1, 1, dtype=torch.float64)) * (rank + 1)).sum().backward()
    optimizer.step()
    assert added.weight.item() == pytest.approx(1.0 - 0.3 * sum(range(1, size + 1)) / size)  # with the defaults' rate


def test_names_that_are_not_unique_or_complete():
    model = make()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="found twice: a"):
        hvd.DistributedOptimizer(inner, [("a", p) for p in model.parameters()])
    with pytest.raises(ValueError, match="must name all"):
        hvd.DistributedOptimizer(inner, list(model.named_parameters())[:2])
    with pytest.raises(ValueError, match="pairs"):
        hvd.DistributedOptimizer(inner, model.parameters())
    with pytest.raises(ValueError, match="must be positive"):
        hvd.DistributedOptimizer(inner, backward_passes_per_step=0)
    with pytest.raises(ValueError, match="only be in one"):
        hvd.DistributedOptimizer(inner, groups=[[model[0].weight], [model[0].weight]])
    with pytest.raises(ValueError, match=r"for op=hvd\.Average"):
        hvd.DistributedOptimizer(inner, op=hvd.Sum, gradient_predivide_factor=2.0)


@pytest.mark.parametrize(
    "make_optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.LBFGS], ids=lambda c: c.__name__
)
def test_copying_the_state_of_a_fresh_optimizer_moves_nothing(rank, make_optimizer):
    model = make()
    before = copy.deepcopy(model)
    optimizer = make_optimizer(model.parameters(), lr=0.1 * (rank + 1))
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert_equal(model, before, 0.0)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_state_of_one_rank_is_copied_to_all(rank, size):
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    if rank == size - 1:
        loss_of(model, torch.ones(2, 6, dtype=torch.float64)).backward()
        optimizer.step()
    hvd.broadcast_optimizer_state(optimizer, root_rank=size - 1)
    hvd.broadcast_parameters(model.named_parameters(), root_rank=size - 1)
    assert len(optimizer.state) == 6
    states = hvd.allgather_object([state["exp_avg"].tolist() for state in optimizer.state.values()])
    assert all(state == states[0] for state in states)
    with pytest.raises(ValueError, match="copies tensors"):
        hvd.broadcast_parameters({"a": 1}, root_rank=0)


def test_adasum_combines_what_the_steps_have_changed(rank, size):
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    if size & (size - 1):
        pytest.skip("Adasum needs a power of two ranks")
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), op=hvd.Adasum)
    optimizer.zero_grad()
    (weight * torch.eye(4, dtype=torch.float64)[rank] * (rank + 1)).sum().backward()
    optimizer.step()
    assert weight.tolist() == [-(r + 1.0) if r < size else 0.0 for r in range(4)]  # orthogonal steps add up


def test_batch_normalisation_over_all_ranks(rank, size):
    torch.manual_seed(3)
    whole = torch.randn(4 * size, 5, 2, dtype=torch.float64)
    ours, theirs = hvd.SyncBatchNorm(5).double(), nn.BatchNorm1d(5).double()
    mine = whole[4 * rank : 4 * rank + 4].clone().requires_grad_()
    everything = whole.clone().requires_grad_()
    out, expected = ours(mine), theirs(everything)
    assert torch.allclose(out, expected[4 * rank : 4 * rank + 4])
    assert torch.allclose(ours.running_var, theirs.running_var)
    out.square().sum().mul(rank + 1).backward()
    weights = torch.arange(1.0, size + 1).repeat_interleave(4).view(-1, 1, 1)
    (expected.square() * weights).sum().backward()
    assert torch.allclose(mine.grad, everything.grad[4 * rank : 4 * rank + 4])
    ours.eval()
    assert ours(mine).shape == mine.shape


CHANGES = {
    "clipped": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "replaced": lambda model: setattr(next(model.parameters()), "grad", torch.zeros_like(next(model.parameters()))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("more", [{}, {"groups": 0}, {"groups": 2}, {"compression": hvd.Compression.fp16}], ids=str)
def test_a_gradient_that_is_changed_on_its_way_is_refused(rank, size, change, more):
    model = make()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), **more)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    (data,) = batches(size, 1)
    loss_of(model, data[rank]).backward()
    CHANGES[change](model)
    with (
        nullcontext()
        if size == 1
        else pytest.raises(RuntimeError, match=r"was changed while it was on its way.*synchronize\(\)")
    ):
        optimizer.step()
    assert size == 1 or all(map(torch.equal, before, model.parameters()))
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, data[rank]).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "held",
    [lambda g: g, lambda g: g[-1:], lambda g: g.detach(), lambda g: torch.from_numpy(g.numpy()), lambda g: g.data.flatten()],
    ids=["itself", "a part", "detached", "through NumPy", "flat"],
)  # fmt: skip
def test_gradients_that_are_kept_stay_what_they_were(rank, size, held):
    model = make()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    first, second = batches(size, 2)
    loss_of(model, first[rank]).backward()
    optimizer.step()
    kept = [held(parameter.grad) for parameter in model.parameters()]
    values = [gradient.clone() for gradient in kept]
    optimizer.zero_grad()
    loss_of(model, second[rank]).backward()
    optimizer.step()
    assert all(map(torch.equal, kept, values))


def test_model_zero_grad_while_float16_is_on_its_way(rank, size):
    model = make()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression=hvd.Compression.fp16
    )
    (data,) = batches(size, 1)
    loss_of(model, data[rank]).backward()
    model.zero_grad()
    optimizer.step()
    assert all(parameter.grad is None or parameter.grad.dtype == parameter.dtype for parameter in model.parameters())
