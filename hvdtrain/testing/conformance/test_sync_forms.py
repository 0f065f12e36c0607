"""Ranks that train apart, with compressed, delayed and divided exchanges: against the same arithmetic in one process."""

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.backends.fragments import cut
from hvdtrain.compression.base import Compression, Sent
from hvdtrain.errors import ConfigError, ModelMismatch
from hvdtrain.testing.conformance.test_sync import INNER, batch, flat, loss_of, made, sizes_of, take_step

pytestmark = pytest.mark.feature("sync")

KEEPS_REST = ["1bit", "topk:0.1", "randomk:0.1", "powersgd:1"]
FORMS = [(4, 1, 1), (4, 3, 1), (4, 0, 2), (5, 2, 3), (3, 2, 3), (10, 9, 1)]
"""Steps between exchanges, delay, fragments."""
OUTER = {"local-sgd": (1.0, 0.0), "diloco": (0.7, 0.9)}


def replicated(backend, sync, inner="SGD", **options):
    model = made()
    return backend.replicate(model, INNER[inner](model.parameters()), sync=sync, **options)


def by_hand(world_size, kind, form, inner, steps):
    """All ranks in this process: the models, apart, and the common weights with their momentum, as they are taken in."""
    every, delay, fragments = form
    rate, momentum = OUTER[kind]
    modules = [made() for _ in range(world_size)]
    models = [list(module.parameters()) for module in modules]
    optimizers = [INNER[inner](module.parameters()) for module in modules]
    common = [p.detach().clone() for p in models[0]]
    velocity = [None] * len(common)
    parts = cut([p.numel() for p in common], fragments)
    seen = {part: [0] * world_size for part in range(fragments)}
    under_way = {}
    for step in range(1, steps + 1):
        for rank, size in enumerate(sizes_of(world_size, step - 1)):
            optimizers[rank].zero_grad()
            if size:
                loss_of(modules[rank], *batch(rank, step - 1, size)).backward()
            optimizers[rank].step()
            for part in range(fragments):
                seen[part][rank] += size
        with torch.no_grad():
            for part in range(fragments):
                if part in under_way and under_way[part][0] == step:
                    arrive(models, common, velocity, under_way.pop(part)[1], rate, momentum)
                first = every * (part + 1) // fragments
                if step < first or (step - first) % every:
                    continue
                sent = {}
                for at, p in enumerate(common):
                    if parts[at] == part:
                        rows = [model[at].detach().clone() for model in models]
                        total = sum(seen[part])
                        sent[at] = rows, sum((row - p) * (n / total) for row, n in zip(rows, seen[part], strict=True))
                seen[part] = [0] * world_size
                if delay:
                    under_way[part] = step + delay, sent
                else:
                    arrive(models, common, velocity, sent, rate, momentum)
    return modules, common


def arrive(models, common, velocity, sent, rate, momentum):
    for at, (rows, way) in sent.items():
        velocity[at] = way if velocity[at] is None else momentum * velocity[at] + way
        common[at] = common[at] + rate * (way + momentum * velocity[at])
        for model, row in zip(models, rows, strict=True):
            model[at].add_(common[at] - row)


def named(kind, form):
    return f"{kind}:{form[0]},delay={form[1]},fragments={form[2]}"


@pytest.mark.costly(2)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("kind", "inner"), [("local-sgd", "momentum"), ("diloco", "AdamW")])
def test_what_arrives_later_or_in_parts_is_the_documented_equation(backend, kind, inner, form):
    replica = replicated(backend, named(kind, form), inner)
    for step in range(21):
        take_step(backend, replica, step)
    modules, common = by_hand(backend.world_size, kind, form, inner, 21)
    torch.testing.assert_close(flat(replica.module), flat(modules[backend.rank]), rtol=1e-10, atol=1e-12)
    have = torch.cat([value.flatten() for value in replica.rank_state()["common"].values()])
    torch.testing.assert_close(have, torch.cat([p.flatten() for p in common]), rtol=1e-10, atol=1e-12)
    replica.settle()


@pytest.mark.parametrize("compression", ["topk:1", "randomk:1"])
@pytest.mark.parametrize("sync", ["local-sgd:3", "diloco:4,delay=2", "diloco:4,fragments=2"])
def test_a_compression_that_leaves_nothing_out_changes_nothing(backend, sync, compression):
    ends = []
    for options in ({}, {"compression": compression}):
        replica = replicated(backend, sync, "AdamW", **options)
        for step in range(9):
            take_step(backend, replica, step)
        replica.settle()
        ends.append(flat(replica.module))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-11, atol=1e-13)


@pytest.mark.costly(2)
@pytest.mark.parametrize("compression", [*KEEPS_REST, "int8", "fp8"])
@pytest.mark.parametrize("delay", [1, 2])
def test_what_was_not_sent_of_weights_is_sent_later(backend, compression, delay):
    replica = replicated(backend, f"local-sgd:3,delay={delay}", "momentum", compression=compression)

    def joined(values):
        return torch.cat([values[name].flatten() for name, _ in replica.module.named_parameters()])

    begin = common = flat(made())
    wanted, seen = torch.zeros_like(common), [0.0] * backend.world_size
    for step in range(17):
        take_step(backend, replica, step)
        seen = [n + size for n, size in zip(seen, sizes_of(backend.world_size, step), strict=True)]
        if step % 3 == 2:  # it is under way
            rows = backend.all_gather(joined(replica.rank_state()["arrived"]["0"]["sent"]))
            wanted += sum((row - common) * (n / sum(seen)) for row, n in zip(rows, seen, strict=True))
            seen = [0.0] * backend.world_size
        common = joined(replica.rank_state()["common"])
        assert all(torch.equal(common, other) for other in backend.all_gather(common))
    states = [state["unsent"]["rests"] for state in backend.all_gather_object(replica.rank_state())]
    assert bool(states[0]) == (backend.world_size > 1 and compression in KEEPS_REST)
    zeros = {name: torch.zeros_like(p) for name, p in replica.module.named_parameters()}
    rest = joined({name: sum((state[name] for state in states if name in state), zero) for name, zero in zeros.items()})
    tolerance = 1e-6 if compression in KEEPS_REST else 0.1
    atol = tolerance * float(wanted.abs().max())
    torch.testing.assert_close(common - begin + rest.detach(), wanted, rtol=0, atol=atol)
    assert bool((common - begin - wanted).abs().max() > atol) == bool(states[0])
    replica.settle()


class Silent(Compression):
    """Sends nothing at all, ever."""

    name = "silent"

    def exchange(self, tensor, memory, seed):
        return Sent(torch.zeros_like(tensor), torch.zeros_like(tensor))
        yield


@pytest.mark.parametrize("compression", ["topk:0.1", "int8", Silent()], ids=lambda c: getattr(c, "name", c))
@pytest.mark.parametrize("sync", [None, "local-sgd:2", "local-sgd:2,delay=1"])
def test_a_number_that_is_not_finite_is_seen_by_all_ranks_whatever_travels(backend, sync, compression):
    replica = replicated(backend, sync, compression=compression)
    for step in range(2):
        take_step(backend, replica, step, even=True)
    before = replica.rank_state()
    if backend.rank == backend.world_size - 1:
        with torch.no_grad():
            replica.module[0].weight[0, 0] = float("nan")
    for step in range(2, 5):
        if sync is None:
            x, y = batch(backend.rank, step, 4)
            replica.backward(loss_of(replica.model, x, y), samples=4)
            skipped = replica.step(skip_nonfinite=True).skipped
            assert skipped
            assert str(replica.rank_state()["rests"]) == str(before["rests"])
            return
        take_step(backend, replica, step, even=True)
    assert not bool(replica.module[0].weight.isfinite().all())
    rests = replica.rank_state()["unsent"]["rests"]
    assert all(bool(rest.isfinite().all()) for rest in rests.values())
    replica.settle()


def test_ranks_see_that_a_number_is_not_finite_though_nothing_at_all_is_sent(backend):
    torch.manual_seed(1)
    model = nn.Linear(6, 5, bias=False)  # nothing travels as it is
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), compression=Silent())
    last = backend.rank == backend.world_size - 1
    for bad in (False, True, False):
        replica.backward(model(torch.full((2, 6), float("inf") if bad and last else 1.0)).square().mean(), samples=2)
        assert replica.step(skip_nonfinite=True).skipped == bad


@pytest.mark.costly(2)
@pytest.mark.parametrize("saved_after", [4, 5, 6, 7])
@pytest.mark.parametrize(
    ("sync", "compression"),
    [
        ("diloco:4,delay=3", None),
        ("diloco:4,delay=3", "powersgd:1"),
        ("local-sgd:4,delay=2,fragments=3", "topk:0.1"),
        ("diloco:4", "randomk:0.1"),
    ],
)
def test_a_loop_goes_on_bit_for_bit_while_an_exchange_is_under_way(backend, tmp_path, sync, compression, saved_after):
    folder = backend.broadcast_object(str(tmp_path))

    def looped():
        replica = replicated(backend, sync, "AdamW", compression=compression)
        return replica, hvdtrain.LoopState(backend, replica)

    whole, _ = looped()
    saved, state = looped()
    for step in range(13):
        take_step(backend, whole, step)
        if step < saved_after:
            take_step(backend, saved, step)
    state.save(hvdtrain.Checkpoints(folder), saved_after)
    with saved.shared_weights():
        meant = flat(saved.module)
    resumed, state = looped()
    assert state.load(hvdtrain.Checkpoints(folder)) == saved_after
    with resumed.shared_weights():
        assert torch.equal(flat(resumed.module), meant)
    for step in range(saved_after, 13):
        take_step(backend, saved, step)  # saving changed nothing
        take_step(backend, resumed, step)
    assert torch.equal(flat(saved.module), flat(whole.module))
    assert torch.equal(flat(resumed.module), flat(whole.module))
    for one in (whole, saved, resumed):
        one.settle()
    assert torch.equal(flat(resumed.module), flat(whole.module))
    assert all(torch.equal(flat(whole.module), other) for other in backend.all_gather(flat(whole.module)))


@pytest.mark.costly(2)
@pytest.mark.parametrize("sync", ["diloco:4,delay=3", "local-sgd:4,delay=2,fragments=3", "local-sgd:3"])
@pytest.mark.parametrize("compression", [None, "powersgd:1", "topk:0.1"])
def test_a_loop_that_goes_back_forgets_the_exchange_that_is_under_way(backend, tmp_path, sync, compression):
    folder = backend.broadcast_object(str(tmp_path))
    replica = replicated(backend, sync, "AdamW", compression=compression)
    state = hvdtrain.LoopState(backend, replica)
    for step in range(6):
        take_step(backend, replica, step)
    state.save(hvdtrain.Checkpoints(folder), 6)
    ends = []
    for elsewhere in (None, 5, 6, 7):
        for step in range(elsewhere or 0):  # exchanges of which nothing must be left
            take_step(backend, replica, 40 + step)
        assert state.load(hvdtrain.Checkpoints(folder)) == 6
        for step in range(6, 11):
            take_step(backend, replica, step)
        ends.append(flat(replica.module))
    assert all(torch.equal(end, ends[0]) for end in ends)
    replica.settle()


@pytest.mark.parametrize("steps", [4, 5, 6])
@pytest.mark.parametrize("sync", ["diloco:4,delay=2", "diloco:4,delay=2,fragments=2"])
def test_shared_weights_are_the_average_once_what_is_under_way_has_arrived(backend, sync, steps):
    early, late = (replicated(backend, sync, "SGD") for _ in range(2))
    for step in range(steps):
        take_step(backend, early, step)
        take_step(backend, late, step)
    with early.shared_weights():
        shared = flat(early.module)
    assert all(torch.equal(shared, other) for other in backend.all_gather(shared))
    early.settle()
    assert torch.equal(flat(early.module), shared)
    for group in late.optimizer.param_groups:
        group["lr"] = 0.0
    for step in range(steps, 6):  # now it arrives, at its own step; what was learned meanwhile counts by its samples
        take_step(backend, late, step, even=True)
    if steps == 6:
        with late.shared_weights():
            torch.testing.assert_close(flat(late.module), shared, rtol=1e-12, atol=1e-14)
    elif steps == 4 and "fragments" not in sync:
        torch.testing.assert_close(flat(late.module), shared, rtol=1e-12, atol=1e-14)
    late.settle()


def test_fragments_take_turns_and_send_as_much_in_all(backend):
    replica = replicated(backend, "diloco:4,fragments=2", "AdamW")
    sent = []
    for step in range(12):
        before = backend.traffic.sent_bytes
        take_step(backend, replica, step)
        sent.append(backend.traffic.sent_bytes - before)
    n = backend.world_size
    whole = 2 * 8 * flat(replica.module).numel() * (n - 1) / n
    around = 200 * (n > 1)
    assert sent[4] == sent[6] == sent[8] == sent[10] == 0
    assert sent[5] + sent[7] == pytest.approx(whole, abs=2 * around)
    assert sent[5] == sent[9]
    assert sent[7] == sent[11]
    assert (0 < sent[5] < 0.75 * whole and 0 < sent[7] < 0.75 * whole) or n == 1


def test_quantised_weights_send_less(backend):
    torch.manual_seed(1)
    model = nn.Linear(300, 200, bias=False)
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), sync="diloco:2", compression="int8")
    before = backend.traffic.sent_bytes
    for _ in range(2):
        replica.backward(model(torch.ones(2, 300)).square().mean(), samples=2)
        replica.step()
    n = backend.world_size
    assert backend.traffic.sent_bytes - before == pytest.approx(60_000 * (1 + 4 / 256) * (n - 1), rel=0.01, abs=100)


@pytest.mark.parametrize("saved_by", [1, 2, 4])
def test_another_number_of_ranks_goes_on_from_the_common_weights_and_sends_the_rest(backend, saved_by):
    if saved_by == backend.world_size:
        return
    replica = replicated(backend, "diloco:4,delay=2", "SGD", compression="topk:0.1")
    for step in range(5):
        take_step(backend, replica, step)
    state = replica.rank_state()
    weight = replica.module[0].weight
    state["unsent"] = {
        "name": "topk:0.1", "memories": {}, "rests": {"0.weight": torch.full_like(weight, 1.0)}
    }  # fmt: skip
    with replica.shared_weights():
        shared = {name: value.clone() for name, value in replica.module.state_dict().items()}
    other = replicated(backend, "diloco:4,delay=2", "SGD", compression="topk:1")
    other.module.load_state_dict(shared)
    other.load_rank_states([state] * saved_by)
    now = other.rank_state()
    ways = state["arrived"]["0"]["ways"]
    for name, way in ways.items():  # the outer step that is in the common weights
        torch.testing.assert_close(now["momentum"][name], way)
        torch.testing.assert_close(now["common"][name], shared[name])
    assert now["counts"][0][:2] == [4.0, 0.0]
    everyones = [one["unsent"]["rests"]["0.weight"] for one in backend.all_gather_object(now)]
    torch.testing.assert_close(sum(everyones), torch.full_like(weight, float(saved_by)).detach())
    for group in other.optimizer.param_groups:
        group["lr"] = 0.0
    for step in range(6):
        take_step(backend, other, step, even=True)
    momentum = now["momentum"]["0.weight"]
    way = torch.full_like(weight, float(saved_by))
    expected = shared["0.weight"] + 0.7 * (way + 0.9 * (0.9 * momentum + way))
    torch.testing.assert_close(weight_of(other), expected.detach(), rtol=1e-9, atol=1e-12)
    for one in (replica, other):
        one.settle()


def weight_of(replica):
    return replica.module[0].weight.detach()


def test_a_parameter_that_is_unfrozen_while_an_exchange_is_under_way_is_exchanged_too(backend):
    model = made()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replica = backend.replicate(model, optimizer, sync="local-sgd:3,delay=2,fragments=2")
    for step in range(10):
        if step == 4:
            model[0].requires_grad_(True)
        take_step(backend, replica, step, even=True)
    replica.settle()
    now = flat(model)
    assert all(torch.equal(now, one) for one in backend.all_gather(now))


def test_a_fit_ends_and_goes_on_with_an_exchange_under_way(backend, tmp_path):
    folder = backend.broadcast_object(str(tmp_path))

    def fitted(place, epochs, resume=False):
        torch.manual_seed(1)
        model = made(torch.float32)
        checkpoints = None if place is None else hvdtrain.Checkpoints(place)
        trainer = hvdtrain.Trainer(
            backend, model, torch.optim.AdamW(model.parameters(), lr=0.05), loss=nn.functional.cross_entropy,
            checkpoints=checkpoints, sync="diloco:3,delay=2,fragments=2", compression="int8",
        )  # fmt: skip
        data = hvdtrain.data.arrays.ArrayDataset(
            torch.randn(26, 6, generator=torch.Generator().manual_seed(2)), torch.arange(26) % 3
        )
        start = checkpoints.find(backend) if resume else None
        result = trainer.fit(data, data, epochs=epochs, global_batch_size=7, resume_from=start)
        return flat(model), result

    whole, result = fitted(None, 4)
    assert all(torch.equal(whole, other) for other in backend.all_gather(whole))
    fitted(folder, 2)
    resumed, again = fitted(folder, 4, resume=True)
    assert torch.equal(whole, resumed)
    assert again.eval_metrics == result.eval_metrics


class Watching:
    def __init__(self):
        self.weights = []

    def on_step(self, trainer, event):
        self.weights.append(flat(trainer.replica.module))


@pytest.mark.costly(1)
@pytest.mark.parametrize("sync", ["local-sgd:2", "diloco:2", "diloco:4,delay=2"])
def test_an_average_over_the_steps_is_of_the_weights_that_the_ranks_have_in_common(backend, tmp_path, sync):
    folder = backend.broadcast_object(str(tmp_path))
    data = hvdtrain.data.arrays.ArrayDataset(
        torch.randn(28, 6, generator=torch.Generator().manual_seed(2)).double(), torch.arange(28) % 3
    )

    def fitted(place, steps, resume=False):
        average, watching = hvdtrain.ExponentialMovingAverage(0.9), Watching()
        model = made()
        checkpoints = None if place is None else hvdtrain.Checkpoints(place)
        trainer = hvdtrain.Trainer(
            backend, model, torch.optim.SGD(model.parameters(), lr=0.3), loss=nn.functional.cross_entropy, sync=sync,
            callbacks=[average, watching], checkpoints=checkpoints, precision="fp64",
        )  # fmt: skip
        start = checkpoints.find(backend) if resume else None
        result = trainer.fit(data, data, epochs=3, max_steps=steps, global_batch_size=7, resume_from=start)
        with average.applied(trainer):
            return flat(model), watching.weights, result.eval_metrics

    whole, weights, metrics = fitted(None, 9)
    assert all(torch.equal(whole, other) for other in backend.all_gather(whole))
    expected = flat(made())
    if "delay" not in sync:
        for after in weights[1::2]:
            expected = 0.9**2 * expected + (1 - 0.9**2) * after
        torch.testing.assert_close(whole, expected, rtol=1e-11, atol=1e-13)
    fitted(folder, 5)
    resumed, _, again = fitted(folder, 9, resume=True)
    assert torch.equal(whole, resumed)
    assert again == metrics


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sync": "diloco:4,delay=4"}, r"delay must be a whole number of steps from 0 and less than the 4 between"),
        ({"sync": "diloco:4,fragments=5"}, r"fragments must be a whole number from 1 to the 4 steps"),
        ({"sync": "diloco:4,fragments=0"}, r"fragments must be a whole number from 1"),
        (
            {"sync": "diloco:9,fragments=9"},
            r"fragments=9 \(--sync\) needs as many parameters at least, and .* trains 6",
        ),
        ({"sync": "diloco:4,dely=1"}, r"delay=STEPS and fragments=NUMBER may follow .*did you mean 'delay'"),
        ({"sync": "diloco:4,delay=1,delay=2"}, r"give delay once, and as a whole number, delay=4"),
        ({"sync": "diloco:4,delay="}, r"give delay once, and as a whole number"),
        ({"sync": "every-step,delay=1"}, r"every-step has no number"),
        (
            {"sync": "diloco:4", "compression": "bf16"},
            r"sync= \(--sync\) and reduce_dtype= .* exclude each other.*int8",
        ),
    ],
)
def test_forms_that_there_are_not_are_refused(backend, options, said):
    with pytest.raises(ConfigError, match=said):
        replicated(backend, **options)


def test_ranks_that_ask_for_different_compressions_of_weights_are_told(backend):
    if backend.world_size == 1:
        return
    with pytest.raises(ModelMismatch, match="setting compression"):
        replicated(backend, "local-sgd:2", compression="int8" if backend.rank else "fp8")
