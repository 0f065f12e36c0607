"""Compressed gradients: the same on every rank, nothing lost on the way, and exact where they are to be."""

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.compression.base import Compression, Gather, Sent, Sum
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError, ModelMismatch, TrainingError

pytestmark = pytest.mark.feature("compression")

KEEPS_REST = ["1bit", "topk:0.1", "randomk:0.1", "powersgd:1"]
ALL = [*KEEPS_REST, "int8", "fp8"]


class EverySecond(Compression):
    """Every second number, the others in the next step."""

    name = "every-second"

    def exchange(self, tensor, memory, seed):
        half = int(memory["half"]) if memory else 0
        sent = torch.zeros_like(tensor)
        sent.view(-1)[half::2] = tensor.view(-1)[half::2]
        total = torch.zeros_like(tensor)
        total.view(-1)[half::2] = yield Sum(sent.view(-1)[half::2].contiguous())
        return Sent(total, sent, {"half": torch.tensor(1 - half)})


def made(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 20), nn.LayerNorm(20), nn.Tanh(), nn.Linear(20, 3)
    ).to(dtype)


def batch(rank, step, samples=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(samples, 1, 6, 6, generator=generator, dtype=dtype)
    return x, torch.arange(samples) % 3


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def counts(backend, step):
    """Samples of each rank: uneven, other ones in each step, and none on the last rank in the second."""
    n = backend.world_size
    return [0 if n > 1 and step == 1 and rank == n - 1 else 2 + (rank + 3 * step) % 5 for rank in range(n)]


def exact(backend, step, dtype=torch.float64):
    """The gradient of the mean over the global batch."""
    model, sizes = made(dtype), counts(backend, step)
    for rank, size in enumerate(sizes):
        if size:
            (loss_of(model, *batch(rank, step, size, dtype)) * (size / sum(sizes))).backward()
    return [p.grad for p in model.parameters()]


def replicated(backend, compression, dtype=torch.float64, **options):
    model = made(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return backend.replicate(model, optimizer, compression=compression, bucket_bytes=4096, **options)


def exchange(backend, replica, step, dtype=torch.float64, total=False, scaler=None):
    sizes = counts(backend, step)
    size = sizes[backend.rank]
    if size:
        loss = loss_of(replica.model, *batch(backend.rank, step, size, dtype))
        loss = loss if scaler is None else scaler.scale(loss)
        replica.backward(loss, samples=size, total=sum(sizes) if total else None)
    replica.reduce_gradients()
    return [p.grad.clone() for p in replica.module.parameters()]


def rests(backend, replica):
    """What all ranks have not sent, by name."""
    states = [state["rests"] for state in backend.all_gather_object(replica.rank_state())]
    return {name: sum(state[name] for state in states) for name in states[0]}


def same_everywhere(backend, tensors):
    flat = torch.cat([t.double().reshape(-1) for t in tensors])
    return all(torch.equal(flat, other) for other in backend.all_gather(flat))


@pytest.mark.costly(5)
@pytest.mark.parametrize("total", [False, True], ids=["counted", "total"])
@pytest.mark.parametrize("compression", [*KEEPS_REST, EverySecond()], ids=lambda c: getattr(c, "name", c))
def test_what_was_not_sent_is_sent_later(backend, compression, total):
    replica = replicated(backend, compression)
    names = [name for name, _ in replica.module.named_parameters()]
    received = [torch.zeros_like(p) for p in replica.module.parameters()]
    wanted = [torch.zeros_like(p) for p in replica.module.parameters()]
    for step in range(4):
        gradients = exchange(backend, replica, step, total=total)
        assert same_everywhere(backend, gradients)
        for at, (gradient, whole) in enumerate(zip(gradients, exact(backend, step), strict=True)):
            received[at] += gradient
            wanted[at] += whole
            if whole.dim() < 2:  # norms and biases travel as they are
                torch.testing.assert_close(gradient, whole, rtol=1e-12, atol=1e-14)
        replica.step()
    unsent = rests(backend, replica)
    assert bool(unsent) == (backend.world_size > 1)
    for name, have, want in zip(names, received, wanted, strict=True):
        torch.testing.assert_close(have + unsent.get(name, 0), want, rtol=1e-6, atol=1e-7)  # scales are float32
        if name in unsent:
            assert not torch.allclose(have, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("compression", ["topk:1", "randomk:1", "powersgd:3"])
def test_what_leaves_nothing_out_is_exact(backend, compression):
    if compression == "powersgd:3":  # of matrices whose gradient has no higher rank
        model = nn.Sequential(nn.Linear(50, 40, bias=False), nn.Linear(40, 3, bias=False)).double()
        replica = backend.replicate(model, compression=compression)
        x = batch(backend.rank, 0)[0].flatten(1)[:, :36]
        x = torch.nn.functional.pad(x, (0, 14))[:3]
        replica.backward(model(x).square().mean(), samples=3)
        replica.reduce_gradients()
        whole = backend.all_reduce(torch.autograd.grad(model(x).square().mean(), model[0].weight)[0], "mean")
        torch.testing.assert_close(model[0].weight.grad, whole, rtol=1e-9, atol=1e-12)
        replica.clear()
        return
    replica = replicated(backend, compression)
    for step in range(3):
        for gradient, whole in zip(exchange(backend, replica, step), exact(backend, step), strict=True):
            torch.testing.assert_close(gradient, whole, rtol=1e-12, atol=1e-14)
        replica.step()


@pytest.mark.parametrize(("compression", "digits"), [("int8", 1 / 127), ("fp8", 1 / 16)])
def test_rounded_gradients_are_the_mean_to_their_rounding(backend, compression, digits):
    replica = replicated(backend, compression, torch.float32)
    for step in range(3):
        for gradient, whole in zip(
            exchange(backend, replica, step, torch.float32), exact(backend, step, torch.float32), strict=True
        ):
            largest = float(whole.abs().max()) * backend.world_size
            torch.testing.assert_close(gradient, whole, rtol=0, atol=4 * digits * largest + 1e-7)
        replica.step()


@pytest.mark.parametrize("compression", KEEPS_REST)
def test_micro_batches_are_one_gradient_and_clipping_sees_what_arrived(backend, compression):
    whole, parts = replicated(backend, compression), replicated(backend, compression)
    x, y = batch(backend.rank, 0, 6)
    for _ in range(2):
        whole.backward(loss_of(whole.model, x, y), samples=6)
        for at in (0, 2, 4):
            with parts.accumulate(last=at == 4):
                parts.backward(loss_of(parts.model, x[at : at + 2], y[at : at + 2]), samples=2)
        whole.reduce_gradients()
        parts.reduce_gradients()
        for one, other in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-7, atol=1e-9)
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in whole.module.parameters()]))
        torch.testing.assert_close(whole.step(clip_norm=1e-3).gradient_norm, norm)
        parts.step()


@pytest.mark.costly(6)
@pytest.mark.parametrize("by_hand", [False, True], ids=["", "mended-by-hand"])
@pytest.mark.parametrize("compression", ALL)
def test_a_number_that_is_not_finite_skips_the_step_everywhere_and_poisons_nothing(backend, compression, by_hand):
    replica = replicated(backend, compression, torch.float32)
    exchange(backend, replica, 0, torch.float32)
    replica.step()
    before = replica.rank_state()
    for bad in (float("inf"), float("nan")):
        x, y = batch(backend.rank, 2, 4, torch.float32)
        loss = loss_of(replica.model, x, y)
        weight = replica.module[3].weight
        last = backend.rank == backend.world_size - 1
        place = torch.zeros(weight.shape, dtype=torch.bool).index_put_(
            (torch.tensor(4), torch.tensor(5)), torch.tensor(last)
        )
        hook = weight.register_hook(lambda g, b=bad, place=place: g.masked_fill(place, b))
        replica.backward(loss, samples=4)
        hook.remove()
        if by_hand:
            replica.reduce_gradients()
            for parameter in replica.module.parameters():
                assert parameter is not weight or not bool(parameter.grad.isfinite().all())
                parameter.grad.zero_()
            replica.step()
        else:
            assert replica.step(skip_nonfinite=True).skipped
        after = replica.rank_state()
        for name, rest in before["rests"].items():
            assert torch.equal(rest, after["rests"][name])
    replica.clear()
    assert all(bool(g.isfinite().all()) for g in exchange(backend, replica, 3, torch.float32))
    replica.step()
    for name, rest in before["rests"].items():  # and what follows is remembered again
        assert not torch.equal(rest, replica.rank_state()["rests"][name])


@pytest.mark.parametrize("known", [True, False], ids=["", "scaler-unknown-at-first"])
def test_rests_do_not_depend_on_the_loss_scale(backend, known):
    plain, scaled = (replicated(backend, "topk:0.1", torch.float32) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)
    if known:
        scaled.expect_scaler(scaler)
    for step in range(4):
        exchange(backend, plain, step, torch.float32)
        exchange(backend, scaled, step, torch.float32, scaler=scaler)
        clip = 1e9  # unscales
        scaled.step(scaler=scaler, clip_norm=clip)
        plain.step(clip_norm=clip)
    assert scaler.get_scale() == 256.0 * 2**4
    for name, rest in plain.rank_state()["rests"].items():
        torch.testing.assert_close(scaled.rank_state()["rests"][name], rest, rtol=1e-5, atol=1e-8)


def test_a_scaler_that_comes_after_rests_is_refused(backend):
    replica = replicated(backend, "topk:0.1", torch.float32)
    exchange(backend, replica, 0, torch.float32)
    replica.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    exchange(backend, replica, 2, torch.float32, scaler=scaler)
    if backend.world_size == 1:
        replica.step(scaler=scaler)
        return
    with pytest.raises(TrainingError, match=r"replica\.expect_scaler"):
        replica.step(scaler=scaler)
    replica.clear()


def test_gradients_that_were_given_up_leave_no_trace(backend):
    replica = replicated(backend, "powersgd:1")
    exchange(backend, replica, 0)
    replica.step()
    before = replica.rank_state()
    exchange(backend, replica, 2)
    replica.clear()
    after = replica.rank_state()
    for kind in ("rests", "memories"):
        assert str(before[kind]) == str(after[kind])


def test_parameters_that_no_rank_used_keep_what_they_had_and_have_no_gradient(backend):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x, which):
            return (self.a if which == "a" else self.b)(x)

    torch.manual_seed(1)
    model = Branches()
    replica = backend.replicate(
        model, torch.optim.SGD(model.parameters(), lr=0.0), compression="topk:0.1", find_unused_parameters=True
    )
    kept = {}
    for step, which in enumerate("aba"):
        x = torch.sin(torch.arange(80.0).view(4, 20) * (backend.rank + 1 + step))
        replica.backward(model(x, which).square().mean(), samples=4)
        replica.reduce_gradients()
        other = model.b if which == "a" else model.a
        assert other.weight.grad is None
        replica.step()
        state = replica.rank_state()["rests"]
        if which == "b" and kept:
            assert torch.equal(state["a.weight"], kept["a.weight"])
        kept = {name: rest.clone() for name, rest in state.items()}


def fitted(backend, folder, compression, epochs, resume=False, scale=False):
    torch.manual_seed(1)
    model = made(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    checkpoints = None if folder is None else hvdtrain.Checkpoints(folder)
    trainer = hvdtrain.Trainer(
        backend, model, optimizer, loss=nn.functional.cross_entropy, checkpoints=checkpoints, compression=compression,
        precision="fp16" if scale else "fp32", clip_norm=1.0,
    )  # fmt: skip
    x = torch.randn(23, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    start = checkpoints.find(backend) if resume else None
    trainer.fit(ArrayDataset(x, torch.arange(23) % 3), epochs=epochs, global_batch_size=7, resume_from=start)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), trainer.replica


@pytest.mark.costly(1)
@pytest.mark.parametrize("scale", [False, True], ids=["", "fp16"])
@pytest.mark.parametrize("compression", [*KEEPS_REST, "int8", "powersgd:1,after=11"])
def test_a_run_that_is_resumed_goes_on_bit_for_bit(backend, tmp_path, compression, scale):
    folder = backend.broadcast_object(str(tmp_path))
    whole, _ = fitted(backend, None, compression, 4, scale=scale)
    fitted(backend, folder, compression, 2, scale=scale)
    resumed, _ = fitted(backend, folder, compression, 4, resume=True, scale=scale)
    assert torch.equal(whole, resumed)
    assert same_everywhere(backend, [whole])


@pytest.mark.costly(1)
@pytest.mark.parametrize("compression", KEEPS_REST)
@pytest.mark.parametrize("compiled", [True, False], ids=["by compiled", "by plain"])
def test_a_run_goes_on_whether_the_model_is_compiled_or_not(backend, tmp_path, compiled, compression):
    folder = backend.broadcast_object(str(tmp_path))

    def looped(wrapped):
        torch.manual_seed(1)
        model = made()
        whole = torch.compile(model, backend="eager") if wrapped else model
        replica = backend.replicate(whole, torch.optim.SGD(whole.parameters(), lr=0.1), compression=compression)
        return replica, model, hvdtrain.LoopState(backend, replica)

    before, model, state = looped(compiled)
    for step in range(2):
        exchange(backend, before, step)
        before.step()
    state.save(hvdtrain.Checkpoints(folder), 2)
    after, other, state = looped(not compiled)
    assert state.load(hvdtrain.Checkpoints(folder)) == 2
    for replica in (before, after):
        exchange(backend, replica, 2)
        replica.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("saved_by", [1, 2, 4])
def test_rests_are_shared_out_on_another_number_of_ranks(backend, saved_by):
    replica = replicated(backend, "topk:0.1")
    names = [name for name, p in replica.module.named_parameters() if p.dim() > 1]
    shapes = dict(replica.module.named_parameters())
    states = [
        {"name": "topk:0.1", "memories": {}, "rests": {n: torch.full_like(shapes[n], rank + 1.0) for n in names}}
        for rank in range(saved_by)
    ]
    replica.load_rank_states(states)
    total = saved_by * (saved_by + 1) / 2
    for name, rest in rests(backend, replica).items():
        torch.testing.assert_close(rest, torch.full_like(shapes[name], total))
    received = exchange(backend, replica, 0)
    replica.step()
    left = rests(backend, replica)
    parameters = [name for name, _ in replica.module.named_parameters()]
    for name, gradient, whole in zip(parameters, received, exact(backend, 0), strict=True):
        expected = whole + (total if name in names else 0.0)
        torch.testing.assert_close(gradient + left.get(name, 0.0), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compression", ["bf16", "fp16"])
def test_types_are_the_reduce_dtype(backend, compression):
    replica = replicated(backend, compression, torch.float32)
    assert replica.options.reduce_dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[compression]
    assert replica.options.compression is None


def test_gradients_of_bfloat16_are_compressed_in_float32(backend):
    replica = replicated(backend, "topk:0.1", torch.bfloat16)
    for gradient in exchange(backend, replica, 0, torch.bfloat16):
        assert gradient.dtype == torch.bfloat16
    replica.step()
    assert all(rest.dtype == torch.float32 for rest in replica.rank_state()["rests"].values())


@pytest.mark.parametrize(
    ("compression", "said"),
    [
        ("powersgd:0", r"powersgd needs a rank, a whole number from 1, as in powersgd:2; got 'powersgd:0'"),
        ("powersgd", r"needs a rank"),
        ("topk:0", r"topk needs the part of the numbers that is sent, more than 0 and at most 1"),
        ("topk:1.5", r"more than 0 and at most 1, as in topk:0\.01; got 'topk:1\.5'"),
        ("int8:4", r"int8 takes no number"),
        ("topc:0.1", r"must be one of int8, fp8, 1bit, powersgd:RANK.*did you mean 'topk'"),
        (3, r"takes a name or a hvdtrain\.Compression, got 3 of int"),
    ],
)
def test_what_there_is_not_is_refused(backend, compression, said):
    with pytest.raises(ConfigError, match=said):
        replicated(backend, compression)


def test_two_words_on_how_gradients_travel_are_refused(backend):
    with pytest.raises(ConfigError, match="exclude each other: both say as what gradients travel"):
        replicated(backend, "int8", torch.float32, reduce_dtype="bf16")


def test_a_model_without_anything_to_compress_is_refused(backend):
    with pytest.raises(ConfigError, match="would compress nothing of this model"):
        backend.replicate(nn.LayerNorm(5), compression="int8")
    with pytest.raises(ConfigError, match=r"compression powersgd:4 would compress nothing of this model.*\(3, 5\)"):
        backend.replicate(nn.Linear(5, 3), compression="powersgd:4")


def test_ranks_that_ask_for_different_ones_are_told(backend):
    if backend.world_size == 1:
        replicated(backend, "int8")
        return
    with pytest.raises(ModelMismatch, match=r"setting compression topk:0\.1, ranks? 1.*topk:0\.2"):
        replicated(backend, "topk:0.1" if backend.rank == 0 else "topk:0.2")


class Unlike(Compression):
    """Yields other things on the last rank."""

    name = "unlike"

    def __init__(self, items, differs):
        self.items, self.differs = items, differs

    def exchange(self, tensor, memory, seed):
        for item in self.items[self.differs]:
            yield item(tensor)
        return Sent(tensor.clone())


UNLIKE = {
    "number": (Gather, lambda t: Gather(t.flatten()[1:])),
    "shape": (Sum, lambda t: Sum(t.reshape(-1))),
    "type": (Gather, lambda t: Gather(t.to(torch.float32).repeat(2, *[1] * (t.dim() - 1)))),
    "type of a sum": (Sum, lambda t: Sum(t.to(torch.float32))),
    "kind": (Sum, Gather),
}


@pytest.mark.parametrize("sync", [None, "local-sgd:1", "local-sgd:2,delay=1"])
@pytest.mark.parametrize("kind", [*UNLIKE, "more", "none"])
def test_a_compression_that_yields_other_things_on_some_ranks_is_refused_on_all(backend, kind, sync):
    last = backend.rank == backend.world_size - 1
    items = {"more": ([Sum], [Sum, Sum]), "none": ([Sum], [])}.get(kind) or [[item] for item in UNLIKE[kind]]
    replica = replicated(backend, Unlike(items, last), sync=sync)

    def steps():
        for step in (0, 2, 3):
            replica.backward(loss_of(replica.model, *batch(backend.rank, step)), samples=4)
            replica.step()

    if backend.world_size == 1:
        steps()
        return
    with pytest.raises(TrainingError, match=rf"yields other things on some ranks.*; rank {backend.world_size - 1}: "):
        steps()


def test_a_compression_that_costs_more_than_it_saves_on_one_machine_says_so_once(backend, logged):
    def said():
        return [message for message in logged if "costs more than it saves" in message]

    replica = replicated(backend, "1bit")  # of a few hundred numbers
    n, sent = backend.world_size, []
    for step in range(20):
        before = backend.traffic.sent_bytes
        exchange(backend, replica, step % 3 + 2)
        replica.step()
        sent.append(backend.traffic.sent_bytes - before)
        assert len(said()) == (step >= 4 and n > 1 and backend.rank == 0 and backend.topology.num_nodes == 1)
    assert len(set(sent[1:])) == 1  # what was sent to measure it is not counted


def test_sparse_gradients_travel_as_they_are(backend):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Flatten(), nn.Linear(16, 5))
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), compression="topk:0.1")
    words = torch.tensor([[backend.rank, 7]])
    replica.backward(model(words).square().mean(), samples=1)
    replica.reduce_gradients()
    own = torch.autograd.grad(model(words).square().mean(), model[0].weight)[0].to_dense()
    torch.testing.assert_close(model[0].weight.grad.to_dense(), backend.all_reduce(own, "mean"))
    assert set(replica.rank_state()["rests"]) == set()
    replica.step()
    assert set(replica.rank_state()["rests"]) == ({"2.weight"} if backend.world_size > 1 else set())


def test_two_replicas_keep_their_rests_apart(backend):
    several = [replicated(backend, "topk:0.1"), replicated(backend, "1bit")]
    alone = [replicated(backend, "topk:0.1"), replicated(backend, "1bit")]
    for step in (0, 2):
        for replica in several:
            loss = loss_of(replica.model, *batch(backend.rank, step))
            replica.backward(loss, samples=4)
        for replica in several:
            replica.step()
    for replica in alone:
        for step in (0, 2):
            replica.backward(loss_of(replica.model, *batch(backend.rank, step)), samples=4)
            replica.step()
    for one, other in zip(several, alone, strict=True):
        rests = other.rank_state()["rests"]
        for name, rest in one.rank_state()["rests"].items():
            assert torch.equal(rest, rests[name])
