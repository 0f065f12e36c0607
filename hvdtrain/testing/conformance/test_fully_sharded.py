"""A model that is cut over the ranks trains as a whole one does, or is refused: to 1e-12 in float64, on every engine."""

import copy

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.errors import CheckpointError, ConfigError, TrainingError
from hvdtrain.testing import cutting
from hvdtrain.testing.cutting import REFUSED_BY, UNITS
from hvdtrain.training.checkpoint import model_state

pytestmark = pytest.mark.feature("sharded model", refused_by=REFUSED_BY)


class Model(nn.Module):
    """Blocks of odd sizes between a first and a last layer; one parameter is smaller than the world, one is frozen."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 7), nn.Unflatten(1, (7, 1)))
            for _ in range(3)
        )
        self.last = nn.Linear(7, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            y = layer(x).view(-1, 7)
            y += x  # in place, on a view
            x = y
        self.calls += 1
        return self.last(x)


def made(seed):
    torch.manual_seed(seed)
    return Model().double().eval()  # running statistics depend on how a batch is cut


def offered(backend):
    return cutting.offered(backend, lambda: backend.replicate(made(1), shard_modules=UNITS))


def optimizer_of(kind, model):
    groups = [
        {"params": list(model.layers.parameters())},
        {"params": [*model.first.parameters(), *model.last.parameters()], "lr": 0.03},
    ]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def cut(backend):
    model = made(1)
    return backend.replicate(model, optimizer_of("sgd", model), shard_modules=UNITS)


def batches(world, micro, step):
    """For each micro-batch, the samples of each rank: unequal numbers."""
    torch.manual_seed(100 + step)
    return [[torch.randn(1 + (rank + k + step) % 3, 5).double() for rank in range(world)] for k in range(micro)]


def train(backend, replica, *, world, rank, steps, micro=2, total=False, start=0, **how):
    """Steps of a rank, or with ``rank=None`` of one process that has all samples."""
    norms = []
    for step in range(start, start + steps):
        parts = batches(world, micro, step)
        count = sum(len(x) for of in parts for x in of)
        for k, of in enumerate(parts):
            x = torch.cat(of) if rank is None else of[rank]
            with replica.accumulate(last=k == micro - 1):
                loss = replica.model(x).square().mean()
                replica.backward(loss, samples=len(x), total=count if total else None)
        norms.append(replica.step(**how).gradient_norm)
    return norms


def values(state):
    return {name: value.double() for name, value in state["model"].items()}


def close(backend, state, expected):
    wrong = ""
    if backend.rank == 0:
        for name, value in values(expected).items():
            if (values(state)[name] - value).abs().max() > 1e-12:
                wrong = name
    assert not backend.broadcast_object(wrong)


HOW = [
    {},
    {"micro": 1, "clip_norm": 0.05},
    {"micro": 3, "total": True, "skip_nonfinite": True},
]


@pytest.mark.costly(1)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("how", HOW)
def test_it_trains_as_one_process_with_the_whole_model_does(backend, reference, kind, how):
    if not offered(backend):
        return
    whole = made(1)
    plain = reference.replicate(whole, optimizer_of(kind, whole))
    model = made(1 + backend.rank)  # rank 0's counts
    replica = backend.replicate(model, optimizer_of(kind, model), shard_modules=UNITS)
    world = backend.world_size
    expected = train(reference, plain, world=world, rank=None, steps=4, **how)
    norms = train(backend, replica, world=world, rank=backend.rank, steps=4, **how)
    for norm, other in zip(norms, expected, strict=True):
        assert (norm is None) == (other is None)
        assert norm is None or abs(norm - other) < 1e-12
    close(backend, replica.whole_state(), plain.whole_state())


def test_each_rank_holds_its_part_of_parameters_gradients_and_state(backend):
    if not offered(backend):
        return
    model = made(1)
    whole = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = optimizer_of("adamw", model)
    replica = backend.replicate(model, optimizer, shard_modules=UNITS)
    own = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters()]
    train(backend, replica, world=backend.world_size, rank=backend.rank, steps=1)
    kept = [getattr(s["exp_avg"], "to_local", lambda s=s: s["exp_avg"])() for s in optimizer.state.values()]
    sizes = torch.tensor([sum(t.numel() for t in own), sum(t.numel() for t in kept)])
    assert backend.all_reduce(sizes).tolist() == [whole, trained]
    if backend.world_size > 1:
        assert int(sizes[0]) < whole


@pytest.mark.costly(1)
@pytest.mark.parametrize(("before", "after"), [(UNITS, UNITS), (UNITS, None), (None, UNITS)])
def test_its_state_goes_on_whether_it_is_cut_or_not(backend, reference, before, after):
    if not offered(backend):
        return
    world, rank = backend.world_size, backend.rank
    whole = made(1)
    plain = reference.replicate(whole, optimizer_of("adamw", whole))
    train(reference, plain, world=world, rank=None, steps=4)
    first = made(1)
    replica = backend.replicate(first, optimizer_of("adamw", first), shard_modules=before)
    train(backend, replica, world=world, rank=rank, steps=2)
    state = replica.whole_state()
    assert bool(state) == (rank == 0)
    second = made(5)
    resumed = backend.replicate(second, optimizer_of("adamw", second), shard_modules=after)
    resumed.load_whole_state(state)
    train(backend, resumed, world=world, rank=rank, steps=2, start=2)
    close(backend, resumed.whole_state(), plain.whole_state())


def test_a_loss_without_weight_adds_nothing_even_where_it_is_no_number(backend, reference):
    if not offered(backend):
        return
    whole, model = made(1), made(1)
    plain = reference.replicate(whole, optimizer_of("sgd", whole))
    replica = backend.replicate(model, optimizer_of("sgd", model), shard_modules=UNITS)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(3)).double()
    plain.backward(plain.model(x).square().mean(), samples=2)
    empty = backend.rank != 0
    replica.backward(replica.model(x[:0] if empty else x).square().mean(), samples=0 if empty else 2)
    plain.step()
    replica.step()
    close(backend, replica.whole_state(), plain.whole_state())


def test_a_step_without_samples_anywhere_changes_nothing(backend):
    if not offered(backend):
        return
    replica = cut(backend)
    before = replica.whole_state()
    replica.step()
    close(backend, replica.whole_state(), before)


def test_gradients_that_are_no_numbers_are_skipped_on_all_ranks(backend):
    if not offered(backend):
        return
    replica = cut(backend)
    before = replica.whole_state()
    loss = replica.model(torch.ones(2, 5).double()).square().mean()
    replica.backward(loss * (float("nan") if backend.rank == 0 else 1.0), samples=2)
    assert replica.step(skip_nonfinite=True).skipped
    after = replica.whole_state()
    for state in (before, after):
        state.get("model", {}).pop("calls", None)
    close(backend, after, before)


REFUSED = [
    ({"find_unused_parameters": True}, r"and find_unused_parameters=True .*freeze what is not used"),
    ({"static_graph": True}, r"and static_graph=True .*leave static_graph out"),
    ({"bucket_bytes": 1000}, r"and bucket_bytes= .*leave bucket_bytes out"),
    ({"reduce_dtype": "bf16"}, r"and reduce_dtype= .*leave reduce_dtype out"),
    ({"shard_modules": "nothing"}, "no module of Model with parameters has a name like .*there are first, layers"),
    ({"shard_modules": "layers"}, "'layers' is a ModuleList, which has no forward pass.*"),
    ({"shard_modules": "("}, "no regular expression"),
]


@pytest.mark.parametrize(("asked", "words"), REFUSED)
def test_what_does_not_go_with_it_is_refused(backend, asked, words):
    if not offered(backend):
        return
    with pytest.raises(ConfigError, match=words):
        backend.replicate(made(1), **{"shard_modules": UNITS, **asked})


@pytest.mark.parametrize("wrap", ["masters", "sharded"])
def test_an_optimizer_that_holds_whole_or_cut_parameters_itself_is_refused(backend, wrap):
    if not offered(backend):
        return
    model = made(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = hvdtrain.MasterWeights(optimizer) if wrap == "masters" else hvdtrain.ShardedOptimizer(optimizer, backend)
    with pytest.raises(ConfigError, match=r"and MasterWeights .*|and a ShardedOptimizer .*plain optimizer"):
        backend.replicate(model, wrapped, shard_modules=UNITS)


def test_an_optimizer_that_has_stepped_goes_on(backend, reference):
    if not offered(backend):
        return
    ends = []
    for on, shard in ((reference, None), (backend, UNITS)):
        model = made(1)
        stepped = torch.optim.Adam(model.parameters(), lr=0.1)
        model(torch.ones(2, 5).double()).square().sum().backward()
        stepped.step()
        stepped.zero_grad()
        replica = on.replicate(model, stepped, shard_modules=shard)
        train(on, replica, world=backend.world_size, rank=None if on is reference else backend.rank, steps=2)
        ends.append(replica.whole_state())
    close(backend, ends[1], ends[0])


CUT = {
    "SGD": [{}, {"momentum": 0.9, "weight_decay": 0.1, "foreach": True}],
    "Adam": [{}, {"foreach": True}, {"fused": True, "amsgrad": True}],
    "AdamW": [{}, {"foreach": True}, {"fused": True}],
    "NAdam": [{}],
    "RAdam": [{"foreach": True}],
    "Adamax": [{}],
    "Adagrad": [{}, {"foreach": True}],
    "Adadelta": [{"foreach": True}],
    "RMSprop": [{"momentum": 0.9, "centered": True}],
    "ASGD": [{}],
}


@pytest.mark.costly(2)
@pytest.mark.parametrize("name", CUT)
def test_torchs_optimizers_step_as_with_the_whole_model(backend, reference, name):
    if not offered(backend):
        return
    for how in CUT[name]:
        ends = []
        for on, shard in ((reference, None), (backend, UNITS)):
            model = made(1)
            optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.03, **how)
            replica = on.replicate(model, optimizer, shard_modules=shard)
            rank = None if on is reference else backend.rank
            train(on, replica, world=backend.world_size, rank=rank, steps=3, micro=1)
            ends.append(replica.whole_state())
        close(backend, ends[1], ends[0])


@pytest.mark.parametrize("name", ["Rprop", "Adafactor", "Muon", "fused SGD", "fused Adagrad"])
def test_torchs_other_optimizers_are_refused(backend, name):
    if not offered(backend):
        return
    model = made(1)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    how = {"fused": True} if "fused" in name else {}
    optimizer = getattr(torch.optim, name.removeprefix("fused "))(matrices, lr=0.1, **how)
    with pytest.raises(
        ConfigError, match=r"an optimizer of torch's that is none of SGD .* exclude each other: .*use one"
    ):
        backend.replicate(model, optimizer, shard_modules=UNITS)


def test_a_changed_model_is_refused(backend):
    if not offered(backend):
        return
    replica = cut(backend)
    loss = replica.model(torch.ones(2, 5).double()).sum()
    replica.model.last.bias.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"after the model was cut over the ranks|did not depend"):
        replica.backward(loss, samples=2)
    backend.barrier()


def test_tied_parameters_in_two_units_are_refused(backend):
    if not offered(backend):
        return
    model = made(1)
    model.layers[0][0].weight = model.layers[1][0].weight
    with pytest.raises(ConfigError, match=r"are one parameter, .*different units"):
        backend.replicate(model, shard_modules=UNITS)


UNCUTTABLE = {
    "0-dimensional": (torch.tensor(1.0), "'layers.0.odd' .* has no dimension"),
    "empty": (torch.ones(0, 4), r"'layers.0.odd' .* has no numbers, and shape \(0, 4\)"),
    "transposed": (torch.ones(3, 4).t(), r"'layers.0.odd' .* is not contiguous \(shape \(4, 3\)"),
    "of another type": (torch.ones(4), "'layers.0.odd' is of torch.float32 and 'layers.0.0.weight' of torch.float64"),
}


@pytest.mark.parametrize("kind", UNCUTTABLE)
def test_parameters_that_torch_does_not_cut_are_refused_before_the_first_step(backend, kind):
    if not offered(backend):
        return
    model, (value, message) = made(1), UNCUTTABLE[kind]
    model.layers[0].odd = nn.Parameter(value)
    with pytest.raises(ConfigError, match=message):
        backend.replicate(model, optimizer_of("sgd", model), shard_modules=UNITS)
    model.layers[0].odd = nn.Parameter(torch.ones(4), requires_grad=False)  # only what is trained travels together
    backend.replicate(model, shard_modules=UNITS)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 3, dtype=torch.complex128), nn.Linear(3, 2, dtype=torch.complex128))

    def forward(self, x):
        return torch.view_as_real(self.layers(x.to(torch.complex128)))


def test_complex_gradients_are_clipped_by_their_norm(backend, reference):
    if not offered(backend):
        return
    torch.manual_seed(1)
    model = Complex()
    whole = copy.deepcopy(model)
    plain = reference.replicate(whole, torch.optim.SGD(whole.parameters(), lr=0.1))
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), shard_modules=UNITS)
    how = {"world": backend.world_size, "steps": 3, "clip_norm": 0.05}
    norms = [train(backend, one, rank=rank, **how) for one, rank in ((plain, None), (replica, backend.rank))]
    assert norms[0][0].dtype == norms[1][0].dtype
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-12, atol=0)
    states = [one.whole_state().get("model", {}) for one in (replica, plain)]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=1e-12)


def test_ranks_that_do_not_do_the_same_are_told(backend):
    if not offered(backend) or backend.world_size == 1:
        return
    replica = cut(backend)
    x = torch.ones(2, 5).double()
    said = "rank 0 ends its step .* and rank 1 runs the model .*equally many micro-batches"
    with pytest.raises(TrainingError, match=said):  # noqa: PT012 - the first rank is told in the backward pass
        with replica.accumulate(last=backend.rank == 0):
            replica.backward(replica.model(x).square().mean(), samples=2)
        replica.model(x)
    backend.barrier()


def test_a_rank_without_samples_is_told_with_the_others(backend):
    if not offered(backend) or backend.world_size == 1:
        return
    replica = cut(backend)
    with pytest.raises(TrainingError, match="Give every rank samples in each step"):
        replica.step() if backend.rank else replica.model(torch.ones(2, 5).double())
    backend.barrier()


def test_a_plain_backward_pass_is_refused(backend):
    if not offered(backend):
        return
    replica = cut(backend)
    with pytest.raises(TrainingError, match=r"replica.backward\(loss, samples=\.\.\.\)"):  # noqa: PT012 - in either
        replica.model(torch.ones(2, 5).double()).sum().backward()
        replica.step()
    backend.barrier()


def test_a_part_that_is_not_used_is_named(backend):
    if not offered(backend):
        return
    model = made(1)
    model.spare = nn.Linear(2, 2).double()
    replica = backend.replicate(model, optimizer_of("sgd", model), shard_modules=UNITS)
    if backend.world_size > 1:
        loss = replica.model(torch.ones(2, 5).double()).sum()
        with pytest.raises(
            TrainingError, match=r"did not depend on some parameters: spare.weight, spare.bias\. Freeze"
        ):
            replica.backward(loss, samples=2)
    backend.barrier()


def test_reentrant_checkpointing_is_refused_with_the_way_out(backend):
    if not offered(backend) or backend.world_size == 1:
        return
    model = made(1)
    replica = backend.replicate(model, optimizer_of("sgd", model), shard_modules=UNITS)
    x = torch.ones(2, 5).double().requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(replica.model, x, use_reentrant=True).sum()
    with pytest.raises(TrainingError, match="use_reentrant=False"):
        replica.backward(loss, samples=2)
    backend.barrier()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_are_summed_and_not_averaged(backend, reference, dtype):
    if not offered(backend):
        return
    whole, model = made(1).to(dtype), made(1).to(dtype)
    plain = reference.replicate(whole, optimizer_of("sgd", whole))
    replica = backend.replicate(model, optimizer_of("sgd", model), shard_modules=UNITS)
    x = torch.ones(backend.world_size, 5, dtype=dtype)
    plain.backward(plain.model(x).square().mean(), samples=len(x))
    plain.reduce_gradients()
    replica.backward(replica.model(x[:1]).square().mean(), samples=1)
    replica.reduce_gradients()
    torch.testing.assert_close(replica.gradient_norm(), plain.gradient_norm(), rtol=0.02, atol=0, check_dtype=False)


def test_a_model_that_is_cut_already_is_refused(backend):
    if not offered(backend) or backend.world_size == 1:
        return
    model = made(1)
    backend.replicate(model, optimizer_of("sgd", model), shard_modules=UNITS)
    with pytest.raises(ConfigError, match=r"is a DTensor, .*hand in the whole model"):
        backend.replicate(model, optimizer_of("sgd", model))
    with pytest.raises(CheckpointError, match=r"is cut over the ranks.*whole_state"):
        model_state(model)
