"""Parameters that come and go are followed on every rank, as one process would (float64, 1e-12)."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

from hvdtrain.errors import ConfigError, ModelMismatch, TrainingError

pytestmark = pytest.mark.feature("changing parameters")

CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def samples(count, start=0):
    return torch.sin(torch.arange(start * 4, (start + count) * 4, dtype=torch.float64)).reshape(count, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)
        self.extra = None

    def forward(self, x):
        out = self.head(self.body(x).tanh())
        return out if self.extra is None else out + self.extra(x)


def made():
    torch.manual_seed(0)
    return Net().double()


def freeze(net, optimizer):
    net.body.requires_grad_(False)


def unfreeze(net, optimizer):
    net.body.requires_grad_(True)


def freeze_one(net, optimizer):
    net.body.bias.requires_grad_(False)


def swap_head(net, optimizer):
    torch.manual_seed(1)
    old = list(net.head.parameters())
    net.head = nn.Linear(6, 2).double()
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if all(p is not o for o in old)] + list(net.head.parameters())


def add_part(net, optimizer):
    torch.manual_seed(2)
    net.extra = nn.Linear(4, 2).double()
    optimizer.add_param_group({"params": list(net.extra.parameters()), "lr": 0.05})


def remove_part(net, optimizer):
    old = list(net.extra.parameters())
    net.extra = None
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if all(p is not o for o in old)]


def parametrize(net, optimizer):
    before = net.head.weight
    nn.utils.parametrizations.weight_norm(net.head, "weight")
    new = [p for name, p in net.head.named_parameters() if "parametrizations" in name]
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not before] + new


STORIES = {
    "unfrozen": [freeze, None, unfreeze, None],
    "frozen": [None, freeze, None, None],
    "one frozen": [None, freeze_one, None, None],
    "to and fro": [freeze, unfreeze, freeze, unfreeze, None],
    "a head swapped": [None, swap_head, None],
    "a part added": [None, add_part, None],
    "added and removed": [add_part, None, remove_part, None],
    "a part parametrized": [None, parametrize, None],
    "at once": [add_part, swap_head, freeze, None],
}


@pytest.mark.costly(9)
@pytest.mark.parametrize("total", [True, False], ids=["total", "counted"])
@pytest.mark.parametrize("story", STORIES)
def test_changes_are_followed(backend, story, total):
    n = backend.world_size
    net = made()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    alone = copy.deepcopy(net)
    alone_optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    replica = backend.replicate(net, optimizer, bucket_bytes=128)
    for change in [None, *STORIES[story]]:
        if change is not None:
            change(net, optimizer)
            change(alone, alone_optimizer)
        alone_optimizer.zero_grad()
        for rank in range(n):
            (alone(samples(3, 3 * rank)).square().mean() / n).backward()
        replica.backward(
            replica.model(samples(3, 3 * backend.rank)).square().mean(), samples=3, total=3 * n if total else None
        )
        result = replica.step(clip_norm=100.0)
        norm = nn.utils.clip_grad_norm_(alone.parameters(), 100.0)
        alone_optimizer.step()
        torch.testing.assert_close(result.gradient_norm, norm, **CLOSE)
        for (name, p), wanted in zip(net.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, wanted, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


@pytest.mark.parametrize("copied", [True, False])
def test_a_new_part_that_ranks_made_differently_is_copied_or_refused(backend, copied):
    net = made()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    replica = backend.replicate(net, optimizer)
    torch.manual_seed(100 + backend.rank)
    net.extra = nn.Linear(4, 2).double()
    optimizer.add_param_group({"params": list(net.extra.parameters())})
    if copied:
        replica.copy_from_rank_zero()
    loss = replica.model(samples(2, 2 * backend.rank)).square().mean()
    if backend.world_size > 1 and not copied:
        with pytest.raises(ModelMismatch, match=r"extra\.weight.*copy_from_rank_zero"):
            replica.backward(loss, samples=2)
        return
    replica.backward(loss, samples=2)
    replica.step()
    assert len({tuple(row) for row in backend.all_gather_object(net.extra.weight.flatten().tolist())}) == 1


def test_a_change_is_followed_by_a_rank_without_samples(backend):
    n = backend.world_size
    net = made()
    replica = backend.replicate(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for step, change in enumerate([None, freeze, None, unfreeze, None]):
        if change is not None:
            change(net, None)
        if backend.rank != step % n or n == 1:
            x = samples(2, 2 * backend.rank)
            replica.backward(replica.model(x).square().mean(), samples=2)
        replica.step()
    states = backend.all_gather_object([p.tolist() for p in net.parameters()])
    assert all(state == states[0] for state in states)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, *, one):
        return self.head(self.one(x).tanh() if one else x)


@pytest.mark.parametrize("kind", ["freeze", "unfreeze", "same"])
@pytest.mark.parametrize("when", ["in all, no overlap", "in the first", "in the last", "in the second of three"])
def test_what_one_rank_used_in_a_step_of_a_change_reaches_all_ranks(backend, when, kind):
    torch.manual_seed(0)
    model = Branches().double()
    model.other.requires_grad_(kind == "freeze")
    alone = copy.deepcopy(model)
    used = {"in all, no overlap": [True, True], "in the first": [True, False], "in the last": [False, True]}
    micro_batches = used.get(when, [False, True, False])
    pair = (model, alone)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in pair]
    replica = backend.replicate(model, optimizers[0], find_unused_parameters=True)
    for step in range(3):
        if step == 1 and kind != "same":
            for net in pair:
                net.other.requires_grad_(kind == "unfreeze")
        for number, one in enumerate(micro_batches):
            for rank in range(backend.world_size):
                x = samples(3, start=100 * step + 10 * number + 3 * rank)
                losses = [net(x, one=one and rank == 0).square().mean() for net in pair]
                if rank == backend.rank:
                    with replica.accumulate(
                        last=number == len(micro_batches) - 1, overlap=when != "in all, no overlap"
                    ):
                        replica.backward(losses[0], samples=3)
                (losses[1] / (backend.world_size * len(micro_batches))).backward()
        replica.step()
        optimizers[1].step()
        optimizers[1].zero_grad()
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.skipif(
    "init_sync" not in inspect.signature(nn.parallel.DistributedDataParallel).parameters,
    reason="torch before 2.5: its DistributedDataParallel keeps what was used, and says so at the next step",
)
def test_micro_batches_that_a_rank_gave_up_count_as_nothing_used(backend):
    torch.manual_seed(0)
    model = Branches().double()
    alone = copy.deepcopy(model)
    pair = (model, alone)
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.1) for net in pair]
    replica = backend.replicate(model, optimizers[0], find_unused_parameters=True)
    for step in range(4):
        if backend.rank == backend.world_size - 1 and step != 2:
            with replica.accumulate(last=False):
                replica.backward(model(samples(2), one=True).square().mean(), samples=2)
            replica.clear()
        for rank in range(backend.world_size):
            x = samples(3, start=100 * step + 3 * rank)
            losses = [net(x, one=step == 2).square().mean() for net in pair]
            if rank == backend.rank:
                replica.backward(losses[0], samples=3)
            (losses[1] / backend.world_size).backward()
        replica.step()
        optimizers[1].step()
        optimizers[1].zero_grad()
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_a_changed_parameter_that_is_not_the_models_is_refused(backend):
    net = made()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    replica = backend.replicate(net, optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ConfigError, match="not the model's"):
        replica.backward(replica.model(samples(2)).square().mean(), samples=2)


def test_a_parameter_frozen_after_the_forward_pass_is_named(backend):
    net = made()
    replica = backend.replicate(net, torch.optim.SGD(net.parameters(), lr=0.1))
    loss = replica.model(samples(2)).square().mean()
    net.head.bias.requires_grad_(False)
    replica.backward(loss, samples=2)
    if net.head.bias.grad is None:  # autograd left it alone
        replica.step()
        return
    with pytest.raises(TrainingError, match=r"head\.bias.*frozen after the forward pass"):
        replica.step()


def test_everything_frozen_is_nothing_to_train(backend):
    net = made()
    replica = backend.replicate(net, torch.optim.SGD(net.parameters(), lr=0.1))
    net.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        replica.step()


@pytest.mark.parametrize("kind", [nn.LazyLinear, nn.LazyBatchNorm1d], ids=["parameter", "buffer"])
def test_a_lazy_module_must_know_its_size(backend, kind):
    net = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d() if kind is nn.LazyBatchNorm1d else nn.LazyLinear(2))
    with pytest.raises(ConfigError, match="no shape yet"):
        backend.replicate(net, torch.optim.SGD(net[0].parameters(), lr=0.1))


def test_a_replica_needs_no_optimizer(backend):
    n = backend.world_size
    net = made()
    alone = copy.deepcopy(net)
    replica = backend.replicate(net)
    for rank in range(n):
        (alone(samples(2, 2 * rank)).square().mean() / n).backward()
    replica.backward(replica.model(samples(2, 2 * backend.rank)).square().mean(), samples=2)
    replica.reduce_gradients()
    for p, wanted in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, wanted.grad, **CLOSE)
    with pytest.raises(ConfigError, match="without an optimizer"):
        replica.step()
    replica.clear()
    assert all(p.grad is None for p in net.parameters())


def quantised_buffer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch gives them up; models that have some are about
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def inference_buffer():
    with torch.inference_mode():
        return torch.ones(2)


UNWRITABLE = {
    "expanded": (lambda: torch.ones(1).expand(3), r"'extra' is expanded.*clone\(\)"),
    "expanded in part": (lambda: torch.ones(2, 1).expand(2, 3), r"'extra' is expanded"),
    "quantised": (quantised_buffer, r"'extra' is a quantised tensor of torch's; register its int_repr\(\)"),
    "sparse": (lambda: torch.eye(3).to_sparse(), r"'extra' has the layout torch.sparse_coo; register it dense"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), r"'extra' has the layout torch.sparse_csr"),
    "of inference mode": (inference_buffer, r"'extra' was made under torch.inference_mode"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_buffer_that_cannot_be_written_is_refused_before_anything_is_copied(backend, kind):
    make, message = UNWRITABLE[kind]
    model = nn.Linear(2, 2)
    model.register_buffer("extra", make())
    before = model.weight.clone()
    with pytest.raises(ConfigError, match=message):
        backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.weight, before)


def test_a_buffer_of_one_place_and_a_transposed_one_are_copied(backend):
    model = nn.Linear(2, 2)
    model.register_buffer("one", torch.full((1,), float(backend.rank)).expand(1, 1))
    model.register_buffer("turned", torch.full((2, 3), float(backend.rank)).t())
    backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not model.one.any()
    assert not model.turned.any()


CONVERTED = {
    "the model and back": lambda model: model.float().double(),
    "a part and back": lambda model: model[2].float().double(),
    "other memory": lambda model: setattr(model[0].weight, "data", model[0].weight.data.clone()),
}


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("moment", [0, 2])
@pytest.mark.parametrize("kind", CONVERTED)
def test_parameters_that_are_converted_and_back_are_exchanged_or_refused(backend, kind, moment, unused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), find_unused_parameters=unused)
    refused = False
    for step in range(4):
        if step == moment:
            CONVERTED[kind](model)
        try:
            loss = replica.model(samples(2, 2 * backend.rank)).square().mean()
            replica.backward(loss, samples=2)
            replica.step()
        except TrainingError as error:
            assert "was converted after replicate()" in str(error)  # noqa: PT017 - every engine may refuse, or do it right
            refused = True
            break
    assert set(backend.all_gather_object(refused)) == {refused}
    states = backend.all_gather_object([p.tolist() for p in model.parameters()])
    assert all(state == states[0] for state in states)
