"""The seam's promises about gradients, against one process with the whole batch (float64, 1e-12)."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from hvdtrain.errors import ConfigError, ModelMismatch, TrainingError

pytestmark = pytest.mark.feature("accumulation")

CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def samples(count, start=0):
    x = torch.sin(torch.arange(start * 4, (start + count) * 4, dtype=torch.float64)).reshape(count, 4)
    return x, x[:, :2].square()


def loss_of(model, x, y):
    return nn.functional.mse_loss(model(x), y)


def shares(backend, counts):
    """This rank's part of a batch that is split over the ranks by ``counts``."""
    start = sum(counts[: backend.rank])
    return samples(counts[backend.rank], start)


def expected_gradients(total, seed=0):
    model = small(seed)
    loss_of(model, *samples(total)).backward()
    return [p.grad for p in model.parameters()]


def replicate(backend, model, lr=0.1, **options):
    return backend.replicate(model, torch.optim.SGD(model.parameters(), lr=lr), **options)


@pytest.mark.parametrize("known", [True, False], ids=["total-given", "total-summed"])
def test_gradients_are_means_over_samples_of_unequal_shares(backend, known):
    counts = [rank + 1 for rank in range(backend.world_size)]
    total = sum(counts)
    replica = replicate(backend, small())
    x, y = shares(backend, counts)
    replica.backward(loss_of(replica.model, x, y), samples=len(x), total=total if known else None)
    replica.reduce_gradients()
    for parameter, expected in zip(replica.module.parameters(), expected_gradients(total), strict=True):
        torch.testing.assert_close(parameter.grad, expected, **CLOSE)


@pytest.mark.parametrize("known", [True, False], ids=["total-given", "total-summed"])
def test_a_rank_without_samples_takes_part_without_a_forward_pass(backend, known):
    counts = [3] + [0] * (backend.world_size - 1)
    replica = replicate(backend, small())
    x, y = shares(backend, counts)
    if len(x) or not known:
        with replica.accumulate(overlap=False):
            if len(x):
                replica.backward(loss_of(replica.model, x, y), samples=3, total=3 if known else None)
            else:
                replica.backward(loss_of(replica.model, x, y), samples=0)
    replica.reduce_gradients()
    for parameter, expected in zip(replica.module.parameters(), expected_gradients(3), strict=True):
        torch.testing.assert_close(parameter.grad, expected, **CLOSE)


def test_an_empty_batch_counts_nothing(backend):
    counts = [2] + [0] * (backend.world_size - 1)
    replica = replicate(backend, small())
    x, y = shares(backend, counts)
    replica.backward(loss_of(replica.model, x, y), samples=len(x))
    replica.reduce_gradients()
    for parameter, expected in zip(replica.module.parameters(), expected_gradients(2), strict=True):
        torch.testing.assert_close(parameter.grad, expected, **CLOSE)


def test_micro_batches_give_the_gradient_of_the_whole_and_are_exchanged_once(backend):
    rank, n = backend.rank, backend.world_size
    counts = [4] * n
    replica = replicate(backend, small())
    for _ in range(3):
        x, y = shares(backend, counts)
        pieces = [slice(0, 1), slice(1, 3), slice(3, 4)] if rank % 2 else [slice(0, 2), slice(2, 3), slice(3, 4)]
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with replica.accumulate(last=last):
                part = x[piece]
                replica.backward(loss_of(replica.model, part, y[piece]), samples=len(part), total=4 * n)
            if not last and n > 1:
                local = next(replica.module.parameters()).grad.clone()
                assert not torch.allclose(backend.all_reduce(local, "mean"), local)
        replica.reduce_gradients()
        for parameter, expected in zip(replica.module.parameters(), expected_gradients(4 * n), strict=True):
            torch.testing.assert_close(parameter.grad, expected, **CLOSE)
        replica.clear()


def test_a_static_graph_gives_the_same_gradients_and_refuses_micro_batches(backend):
    n = backend.world_size
    replica = replicate(backend, small(), static_graph=True)
    for _ in range(3):
        x, y = shares(backend, [4] * n)
        replica.backward(loss_of(replica.model, x, y), samples=4, total=4 * n)
        replica.reduce_gradients()
        for parameter, expected in zip(replica.module.parameters(), expected_gradients(4 * n), strict=True):
            torch.testing.assert_close(parameter.grad, expected, **CLOSE)
        replica.clear()
    with pytest.raises(ConfigError, match="static_graph"), replica.accumulate(last=False):
        pass


class Spare(nn.Sequential):
    """With a part that nothing uses."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        return self[1](self[0](x))


@pytest.mark.parametrize("without", [(0,), (2, 3), (0, 1, 3)], ids=str)
def test_with_a_static_graph_other_ranks_may_be_without_samples_in_each_step(backend, without):
    n = backend.world_size
    torch.manual_seed(0)
    replica = replicate(backend, Spare(nn.Tanh(), nn.Linear(4, 2)).double(), static_graph=True)
    alone = copy.deepcopy(replica.module)
    for step in range(5):
        counts = [0 if step in without and n > 1 and rank == step % n else 2 for rank in range(n)]
        x, y = shares(backend, counts)
        if len(x):
            replica.backward(nn.functional.mse_loss(replica.model(x), y), samples=len(x))
        replica.reduce_gradients()
        x, y = samples(sum(counts))
        expected = torch.autograd.grad(nn.functional.mse_loss(alone(x), y), list(alone[1].parameters()))
        for parameter, gradient in zip(replica.module[1].parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, **CLOSE)
        assert replica.module.spare.weight.grad is None
        replica.clear()


def test_clipping_sees_averaged_gradients(backend):
    counts = [rank + 1 for rank in range(backend.world_size)]
    replica = replicate(backend, small(), lr=1.0)
    before = [p.detach().clone() for p in replica.module.parameters()]
    x, y = shares(backend, counts)
    replica.backward(loss_of(replica.model, x, y), samples=len(x), total=sum(counts))
    result = replica.step(clip_norm=1e-3)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected_gradients(sum(counts))))
    assert abs(float(result.gradient_norm) - norm) < 1e-12
    moved = math.sqrt(
        sum(float((p.detach() - b).square().sum()) for p, b in zip(replica.module.parameters(), before, strict=True))
    )
    assert abs(moved - 1e-3) < 1e-5


def test_an_infinity_on_one_rank_skips_the_step_on_all(backend):
    model = small().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    replica = replicate(backend, model)
    before = copy.deepcopy(model.state_dict())
    x = torch.ones(2, 4)
    loss = model_loss = replica.model(x).square().mean()
    if backend.rank == backend.world_size - 1:
        loss = model_loss * math.inf
    replica.backward(scaler.scale(loss), samples=2, total=2 * backend.world_size)
    result = replica.step(scaler=scaler, clip_norm=1.0)
    assert result.skipped
    assert backend.all_gather_object(scaler.get_scale()) == [512.0] * backend.world_size
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    replica.backward(scaler.scale(replica.model(x).square().mean()), samples=2, total=2 * backend.world_size)
    assert not replica.step(scaler=scaler).skipped


class Branches(nn.Module):
    """One layer that all use, one that only some ranks use, one that nobody uses."""

    def __init__(self):
        super().__init__()
        self.all, self.some, self.none = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x, use_some):
        return self.all(x) + (self.some(x) if use_some else 0)


def test_unused_parameters_stay_untouched_and_partly_used_ones_are_averaged(backend):
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    replica = backend.replicate(model, optimizer, find_unused_parameters=True)
    alone = copy.deepcopy(model)
    unused = model.none.weight.detach().clone()
    n = backend.world_size
    for _ in range(3):
        x, _ = samples(2, 2 * backend.rank)
        replica.backward(replica.model(x, backend.rank == 0).square().mean(), samples=2, total=2 * n)
        replica.reduce_gradients()
        assert model.none.weight.grad is None
        alone.zero_grad()
        for rank in range(n):
            part, _ = samples(2, 2 * rank)
            (alone(part, rank == 0).square().mean() / n).backward()
        torch.testing.assert_close(model.some.weight.grad, alone.some.weight.grad, **CLOSE)
        torch.testing.assert_close(model.all.weight.grad, alone.all.weight.grad, **CLOSE)
        replica.step()
        alone.load_state_dict(model.state_dict())
    assert torch.equal(model.none.weight, unused)


def test_an_unused_parameter_is_named_with_the_way_out(backend):
    torch.manual_seed(0)
    replica = replicate(backend, Branches().double())
    x, _ = samples(2, 2 * backend.rank)
    n = backend.world_size
    replica.backward(replica.model(x, True).square().mean(), samples=2, total=2 * n)
    if n == 1:  # nothing to exchange
        replica.step()
        return
    with pytest.raises(TrainingError, match=r"depend on some parameters: none\.\w+, none.*--find-unused-parameters"):
        replica.reduce_gradients()
    assert backend.all_gather_object(backend.rank) == list(range(n))  # and the engine is none the worse


def test_a_parameter_that_only_an_early_micro_batch_used_is_averaged(backend):
    torch.manual_seed(0)
    model = Branches().double()
    replica = replicate(backend, model, find_unused_parameters=True)
    alone = copy.deepcopy(model)
    n = backend.world_size
    for _ in range(2):
        for number in range(2):
            x, _ = samples(1, 2 * backend.rank + number)
            with replica.accumulate(last=number == 1):
                replica.backward(replica.model(x, number == 0).square().mean(), samples=1, total=2 * n)
        replica.reduce_gradients()
        alone.zero_grad()
        for rank in range(n):
            for number in range(2):
                part, _ = samples(1, 2 * rank + number)
                (alone(part, number == 0).square().mean() / (2 * n)).backward()
        torch.testing.assert_close(model.some.weight.grad, alone.some.weight.grad, **CLOSE)
        torch.testing.assert_close(model.all.weight.grad, alone.all.weight.grad, **CLOSE)
        assert model.none.weight.grad is None
        replica.clear()


class Turned(nn.Module):
    """Layers side by side, which a rank may use in any order, and leave one out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 2) for _ in range(4))

    def forward(self, x, order):
        return sum(self.layers[number](x) * (number + 1) for number in order)


@pytest.mark.parametrize("leave_out", [False, True])
def test_ranks_may_complete_their_gradients_in_different_order(backend, leave_out):
    torch.manual_seed(0)
    model = Turned().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replica = backend.replicate(model, optimizer, find_unused_parameters=leave_out, bucket_bytes=64)  # a pack a weight
    alone = copy.deepcopy(model)
    n = backend.world_size

    def order_of(rank):
        order = [(rank + step) % 4 for step in range(4)]
        return order[leave_out:] if rank % 2 else order[::-1]

    for _ in range(3):
        x, _ = samples(2, 2 * backend.rank)
        replica.backward(replica.model(x, order_of(backend.rank)).square().mean(), samples=2, total=2 * n)
        replica.reduce_gradients()
        alone.zero_grad()
        for rank in range(n):
            part, _ = samples(2, 2 * rank)
            (alone(part, order_of(rank)).square().mean() / n).backward()
        for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad, **CLOSE)
        replica.clear()


def test_sparse_gradients_are_averaged(backend):
    torch.manual_seed(0)
    model = nn.EmbeddingBag(10, 3, mode="sum", sparse=True).double()
    alone = copy.deepcopy(model)
    replica = replicate(backend, model)
    n = backend.world_size
    bags = [torch.tensor([[rank, rank + 1, 1]]) for rank in range(n)]
    replica.backward(replica.model(bags[backend.rank]).square().mean(), samples=1, total=n)
    norm = float(replica.step(clip_norm=1e9).gradient_norm)
    for bag in bags:
        (alone(bag).square().mean() / n).backward()
    torch.testing.assert_close(model.weight, alone.weight - 0.1 * alone.weight.grad.to_dense(), **CLOSE)
    assert abs(norm - float(alone.weight.grad.to_dense().norm())) < 1e-12


class TiedEmbedding(nn.Module):
    """A sparse embedding whose weight another part uses too."""

    def __init__(self, first):
        super().__init__()
        parts = {"embedding": nn.Embedding(10, 3, sparse=True), "head": nn.Linear(3, 10, bias=False)}
        for name in [first, *(set(parts) - {first})]:
            self.add_module(name, parts[name])
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("first", ["embedding", "head"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_sparse_embedding_that_is_tied_to_a_head_has_dense_gradients(backend, first, optimizer):
    torch.manual_seed(0)
    n = backend.world_size
    model = TiedEmbedding(first).double()
    alone = copy.deepcopy(model)
    alone_optimizer = optimizer(alone.parameters(), lr=0.1)
    replica = backend.replicate(model, optimizer(model.parameters(), lr=0.1))
    for _ in range(3):
        alone_optimizer.zero_grad()
        for rank in range(n):
            (alone(torch.tensor([rank, rank + 3])).square().mean() / n).backward()
        alone_optimizer.step()
        loss = replica.model(torch.tensor([backend.rank, backend.rank + 3])).square().mean()
        replica.backward(loss, samples=2)
        replica.step()
    torch.testing.assert_close(model.embedding.weight, alone.embedding.weight, **CLOSE)
    assert model.head.weight is model.embedding.weight


UNEXPECTED = {
    "functional": lambda: (nn.ParameterDict({"weight": nn.Parameter(torch.ones(10, 3))}), "weight"),
    "tied, and the embedding alone": lambda: (TiedEmbedding("embedding"), "embedding.weight"),
}


@pytest.mark.parametrize("kind", UNEXPECTED)
def test_a_sparse_gradient_that_other_ranks_could_not_expect_is_refused(backend, kind):
    model, name = UNEXPECTED[kind]()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    weight = dict(model.named_parameters())[name]
    loss = nn.functional.embedding(torch.tensor([1, 2]), weight, sparse=True).square().mean()
    if backend.world_size == 1:  # nobody else need know
        replica.backward(loss, samples=2)
        replica.step()
        return
    with pytest.raises(TrainingError, match=r"is sparse, which only nn\.Embedding.*sparse=False"):
        replica.backward(loss, samples=2)


class WithBuffers(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("kept", torch.full((2,), float(rank)))
        self.register_buffer("hidden", torch.full((2,), rank), persistent=False)

    def forward(self, x):
        return self.linear(x)


KINDS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")  # a closure, sparse gradients, matrices only
)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_starts_as_on_rank_zero(backend, kind):
    torch.manual_seed(backend.rank)
    model = WithBuffers(backend.rank)
    args = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1 * (backend.rank + 1), **args)
    for _ in range(backend.rank % 2 + 1):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    own = (copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()))
    backend.replicate(model, optimizer)
    everyone = backend.all_gather_object((own, model.state_dict(), model.hidden, optimizer.state_dict()))
    first_model, first_optimizer = everyone[0][0]
    for _, state, hidden, optimizer_state in everyone:
        assert all(torch.equal(state[name], value) for name, value in first_model.items())
        assert hidden.tolist() == [0, 0]
        assert optimizer_state["param_groups"] == first_optimizer["param_groups"]
        for index, entry in first_optimizer["state"].items():
            for name, value in entry.items():
                assert torch.equal(torch.as_tensor(optimizer_state["state"][index][name]), torch.as_tensor(value))


def test_a_fresh_optimizer_does_not_move_the_weights(backend):
    model = small()
    before = copy.deepcopy(model.state_dict())
    backend.replicate(model, torch.optim.AdamW(model.parameters(), lr=0.5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["layer", "shape", "dtype"])
def test_another_model_on_one_rank_is_named(backend, kind):
    n = backend.world_size
    if n == 1:
        return  # nobody to differ from
    other = {
        "layer": lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(2, 2)),
        "shape": lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)),
        "dtype": lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2).double()),
    }
    model = other[kind]() if backend.rank == n - 1 else nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    with pytest.raises(ModelMismatch, match=rf"rank {n - 1}.*parameter|parameter.*rank {n - 1}"):
        replicate(backend, model)


def test_a_foreign_parameter_in_the_optimizer_is_refused(backend):
    model, other = small(), small()
    with pytest.raises(ConfigError, match="not the model's"):
        backend.replicate(model, torch.optim.SGD(other.parameters(), lr=0.1))


def test_calls_out_of_order_are_refused(backend):
    replica = replicate(backend, small())
    x, y = samples(2)
    replica.backward(loss_of(replica.model, x, y), samples=2, total=2 * backend.world_size)
    with pytest.raises(TrainingError, match="after this step's last micro-batch"):
        replica.backward(loss_of(replica.module, x, y), samples=2, total=2)
    replica.step()


def test_a_step_on_gradients_that_were_not_exchanged_is_refused(backend):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()  # nobody's business yet
    replica = backend.replicate(model, optimizer)
    x, y = samples(2)
    before = copy.deepcopy(model.state_dict())
    loss_of(replica.module, x, y).backward()
    with pytest.raises(TrainingError, match=r"not exchanged with the other ranks; call replica\.backward"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    replica.clear()
    optimizer.step()  # without gradients it moves nothing
    replica.backward(loss_of(replica.model, x, y), samples=2, total=2 * backend.world_size)
    replica.reduce_gradients()
    optimizer.step()
    replica.clear()
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_closures_are_refused(backend):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replica = backend.replicate(model, optimizer)
    calls = []
    with pytest.raises(TrainingError, match=r"optimizer\.step\(closure\).*replica\.backward"):
        optimizer.step(lambda: calls.append(1))
    with pytest.raises(TrainingError, match=r"optimizer\.step\(closure\)"):
        optimizer.step(closure=lambda: calls.append(1))
    assert calls == []
    replica.step()
    with pytest.raises(ConfigError, match="LBFGS needs a closure"):
        backend.replicate(model, torch.optim.LBFGS(model.parameters()))


def test_the_optimizer_stays_the_users_own(backend):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("stepped"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    replica = backend.replicate(model, optimizer)
    assert replica.optimizer is optimizer
    assert type(optimizer) is torch.optim.SGD
    x, y = samples(2)
    for _ in range(2):
        replica.backward(loss_of(replica.model, x, y), samples=2, total=2 * backend.world_size)
        replica.step()
        scheduler.step()  # warns if it does not see the steps; warnings are errors here
    optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad(set_to_none=True)
    assert seen == ["stepped", "stepped"]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    fresh = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(pickle.dumps(optimizer)) > 0


@pytest.mark.parametrize("length", [1, 2, 7, 13])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_the_loader_gives_each_sample_once_in_equally_many_steps(backend, length, batch_size):
    data = torch.utils.data.TensorDataset(torch.arange(length))
    loader = backend.loader(data, batch_size=batch_size, shuffle=True)
    for _ in range(2):
        batches = [batch[0].tolist() for batch in loader]
        everyone = backend.all_gather_object(batches)
        assert {len(b) for b in everyone} == {len(loader)}
        assert sorted(i for rank in everyone for batch in rank for i in batch) == list(range(length))
