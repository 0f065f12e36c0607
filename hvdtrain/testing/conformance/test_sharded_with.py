"""A model that is cut over the ranks, with activation checkpointing, compilers and GradScalers: as the whole model without."""

import math

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.backends.units import is_cut
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.testing import cutting
from hvdtrain.testing.cutting import REFUSED_BY
from hvdtrain.training.activation_checkpointing import SELECTIVE_CONTEXTS, checkpoint_activations

pytestmark = [
    pytest.mark.feature("sharded model", refused_by=REFUSED_BY),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch hides it by itself
]

UNITS = r"layers[.][^.]+|pair[.]1"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 6))
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return x + self.inner(self.norm(x))


class Model(nn.Module):
    """Blocks that are units, and a pair whose last one is."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.pair = nn.Sequential(nn.Linear(6, 6), Block())
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(self.pair(x))


def made():
    torch.manual_seed(1)
    return Model().double()


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def offered(backend):
    return cutting.offered(backend, lambda: backend.replicate(made(), shard_modules=UNITS))


def parameters(model):
    return torch.cat([(p.full_tensor() if is_cut(p) else p).detach().flatten() for p in model.parameters()])


def close(model, other):
    assert float((parameters(model) - parameters(other)).abs().max()) < 1e-12


def train(backend, model, shard=UNITS, after=lambda model: None, **how):
    """Steps of two micro-batches, with other dropout on each rank."""
    replica = backend.replicate(model, optimizer_of(model), shard_modules=shard)
    after(model)
    torch.manual_seed(20 + backend.rank)
    for _ in range(3):
        for last in (False, True):
            x = torch.randn(1 + backend.rank % 2, 5).double()
            with replica.accumulate(last=last):
                replica.backward(replica.model(x).square().mean(), samples=len(x))
        replica.step(**how)
    return replica


CHECKPOINTED = [r"layers[.][^.]+", r"layers[.]\d+[.]inner", "pair", r"first|layers[.]1|pair[.]1"]


@pytest.mark.costly(1)
@pytest.mark.parametrize(("when", "policy"), [("before", "full"), ("after", "full"), ("before", "selective")])
@pytest.mark.parametrize("modules", CHECKPOINTED)
def test_activations_are_computed_again_inside_around_and_beside_what_is_gathered(backend, modules, when, policy):
    if not offered(backend) or (policy == "selective" and SELECTIVE_CONTEXTS is None):
        return

    def checkpointed(model):
        checkpoint_activations(model, modules, policy=policy)

    plain, model = made(), made()
    if when == "before":
        checkpointed(model)
    calls = [0, 0]
    for at, block in enumerate((model.layers[1], model.pair[1])):
        block.inner[0].register_forward_hook(lambda *_, at=at: calls.__setitem__(at, calls[at] + 1))
    train(backend, plain, clip_norm=0.1)
    train(backend, model, after=checkpointed if when == "after" else lambda model: None, clip_norm=0.1)
    close(model, plain)
    assert max(calls) == 12  # of 6 forward passes


def run(backend, shard, *, fit=None, **options):
    """A Trainer that has fitted, without dropout."""
    torch.manual_seed(2)
    n = 12 * backend.world_size
    kind = torch.float32 if options.get("precision") == "fp16" else torch.float64
    data = ArrayDataset(torch.randn(n, 5, dtype=kind), torch.arange(n) % 3)
    model = made().to(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if shard is not None:
        options["shard_modules"] = shard
    # Adam would make much of how halves round where a gradient is nearly none.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5) if kind == torch.float32 else optimizer_of(model)
    options = {"precision": "fp64", "loss": nn.functional.cross_entropy, **options}
    trainer = hvdtrain.Trainer(backend, model, optimizer, **options)
    trainer.fit(data, epochs=2, global_batch_size=4 * backend.world_size, **(fit or {}))
    return trainer


class Graphs(hvdtrain.Callback):
    """How many graphs had been compiled when training began."""

    ahead = 0

    def on_start(self, trainer):
        self.ahead = torch._dynamo.utils.counters["stats"]["unique_graphs"]


def counted():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


@pytest.mark.costly(0.5)
@pytest.mark.feature("compile")
@pytest.mark.parametrize("how", [{}, {"checkpoint_modules": r"layers[.][12]", "accumulate": 2}])
def test_each_module_that_is_gathered_is_compiled_before_the_first_step(backend, how):
    if not offered(backend):
        return
    counters, graphs = counted(), Graphs()
    plain = run(backend, None)
    compiled = run(backend, UNITS, compile={"backend": "aot_eager"}, callbacks=[graphs], **how)
    close(compiled.replica.module, plain.replica.module)
    assert 4 <= graphs.ahead == counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    assert list(compiled.replica.module.state_dict()) == list(plain.replica.module.state_dict())


@pytest.mark.costly(0.5)
@pytest.mark.feature("compile")
def test_a_compiled_run_goes_on_whether_it_is_cut_or_not(backend, tmp_path):
    if not offered(backend):
        return
    counted()
    folder = backend.broadcast_object(str(tmp_path))
    how = {"compile": {"backend": "aot_eager"}}
    plain = run(backend, None)
    run(backend, UNITS, checkpoints=hvdtrain.Checkpoints(folder), fit={"max_steps": 2}, **how)
    run(
        backend,
        None,
        checkpoints=hvdtrain.Checkpoints(folder),
        fit={"max_steps": 4, "resume_from": hvdtrain.Checkpoints(folder).find(backend)},
        **how,
    )
    end = run(backend, UNITS, fit={"resume_from": hvdtrain.Checkpoints(folder).find(backend)}, **how)
    close(end.replica.module, plain.replica.module)


def wrapped_whole(model):
    return torch.compile(model, backend="aot_eager")


def wrapped_units(model):
    for number, layer in enumerate(model.layers):
        model.layers[number] = torch.compile(layer, backend="aot_eager")
    return model


def compiled_in_place(model):
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    return model


def compiled_whole_in_place(model):
    model.compile(backend="aot_eager")
    return model


def compiled_forward(model):
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager")
    return model


@pytest.mark.costly(1)
@pytest.mark.feature("compile")
@pytest.mark.parametrize(
    "by", [wrapped_whole, wrapped_units, compiled_in_place, compiled_whole_in_place, compiled_forward]
)
def test_what_the_user_has_compiled_is_gathered_too(backend, by):
    if not offered(backend):
        return
    counted()
    plain = train(backend, made().eval(), None)
    replica = train(backend, by(made().eval()))
    close(replica.module, plain.module)


def scaled(backend, shard, optimizer, infinite):
    """What steps with a GradScaler come to, one of which has an infinity on one rank alone."""
    model = made().eval()
    replica = backend.replicate(model, optimizer(model), shard_modules=shard)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    told = []
    for step in range(5):
        torch.manual_seed(10 * step + backend.rank)
        x = torch.randn(1 + backend.rank % 2, 5).double()
        loss = replica.model(x).square().mean()
        if step == 2 and backend.rank == infinite % backend.world_size:
            loss = loss * math.inf
        replica.backward(scaler.scale(loss), samples=len(x))
        how = {"clip_norm": 0.05} if step % 2 else {"want_norm": True}
        result = replica.step(scaler=scaler, **how)
        told.append((result.skipped, scaler.get_scale(), float(result.gradient_norm)))
    return model, told


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "AdamW foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, foreach=True),
    "AdamW fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, fused=True),
    "a part of the parameters": lambda model: torch.optim.SGD(model.last.parameters(), lr=0.1),
}


@pytest.mark.costly(1)
@pytest.mark.parametrize("infinite", [0, 1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_infinity_on_one_rank_is_skipped_by_all_and_norms_are_of_unscaled_gradients(backend, name, infinite):
    if not offered(backend):
        return
    plain, expected = scaled(backend, None, OPTIMIZERS[name], infinite)
    model, told = scaled(backend, UNITS, OPTIMIZERS[name], infinite)
    close(model, plain)
    assert [said[0] for said in told] == [step == 2 for step in range(5)]
    for said, other in zip(told, expected, strict=True):
        assert said == pytest.approx(other, rel=0, abs=1e-12, nan_ok=True)
    assert len(set(backend.all_gather_object(repr(told)))) == 1


class Spoilt(nn.Module):
    """Overflows in the gradient of one number, which one rank holds, beside the optimizer's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.aside = nn.Parameter(torch.ones(8, dtype=torch.float64))

    def forward(self, x, by):
        factors = torch.ones(8, dtype=torch.float64)
        factors[-1] = by
        return self.layers[0](x).sum() + (self.aside * factors).sum()


def test_an_infinity_in_a_part_that_one_rank_holds_and_no_optimizer_is_skipped_by_all(backend):
    if not offered(backend):
        return
    torch.manual_seed(1)
    model = Spoilt().double()
    optimizer = torch.optim.SGD(model.layers.parameters(), lr=0.1)
    replica = backend.replicate(model, optimizer, shard_modules=r"layers[.]0")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = parameters(model)
    replica.backward(scaler.scale(replica.model(torch.ones(2, 4).double(), math.inf)), samples=2)
    assert replica.step(scaler=scaler).skipped
    assert torch.equal(parameters(model), before)
    assert backend.all_gather_object(scaler.get_scale()) == [512.0] * backend.world_size


def test_the_trainers_fp16_is_that_of_the_whole_model(backend):
    if not offered(backend):
        return
    ends = [run(backend, shard, precision="fp16") for shard in (None, UNITS)]
    whole, cut = (parameters(end.replica.module) for end in ends)
    moved = float((whole - parameters(made()).float()).abs().max())
    assert float((cut - whole).abs().max()) < 0.01 * moved
    assert moved > 0.05
    scales = [end.precision.scaler.get_scale() for end in ends]
    assert scales[0] == scales[1]
