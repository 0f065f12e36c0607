"""Groups of ranks that exchange everything inside, and less with each other: where nothing is left out, as without groups."""

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.errors import ConfigError, ModelMismatch
from hvdtrain.testing.conformance.test_compression import exact, exchange, replicated, rests
from hvdtrain.testing.conformance.test_sync import INNER, batch, flat, loss_of, made, sizes_of, take_step


def divided(backend):
    """Numbers of ranks in equal groups."""
    n = backend.world_size
    return [size for size in range(1, n + 1) if n % size == 0]


def grouped(backend, sync, inner, size, **options):
    model = made()
    return backend.replicate(model, INNER[inner](model.parameters()), sync=sync, sync_group=size, **options)


def by_hand(world_size, size, period, inner, steps, clip_norm=None):
    """One model a group, which learns from all samples of its ranks; each ends up as its ranks' do."""
    modules = [made() for _ in range(world_size // size)]
    optimizers = [INNER[inner](module.parameters()) for module in modules]
    seen = [0] * len(modules)
    for step in range(steps):
        sizes = sizes_of(world_size, step)
        for group, module in enumerate(modules):
            optimizers[group].zero_grad()
            own = {rank: sizes[rank] for rank in range(group * size, (group + 1) * size)}
            for rank, count in own.items():
                if count:
                    (loss_of(module, *batch(rank, step, count)) * (count / sum(own.values()))).backward()
            if clip_norm is not None and sum(own.values()):
                nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
            optimizers[group].step()
            seen[group] += sum(own.values())
        if (step + 1) % period == 0:
            with torch.no_grad():
                for row in zip(*[module.parameters() for module in modules], strict=True):
                    mean = sum(p * (count / sum(seen)) for p, count in zip(row, seen, strict=True))
                    for p in row:
                        p.copy_(mean)
            seen = [0] * len(modules)
    return modules


@pytest.mark.costly(2)
@pytest.mark.feature("sync")
@pytest.mark.parametrize("total", [False, True], ids=["counted", "total"])
@pytest.mark.parametrize("inner", ["SGD", "AdamW"])
def test_a_group_trains_as_one_rank_with_all_its_samples(backend, inner, total):
    for size in divided(backend):
        replica = grouped(backend, "local-sgd:3", inner, size)
        for step in range(8):
            take_step(backend, replica, step, total=total, clip_norm=0.5)
        modules = by_hand(backend.world_size, size, 3, inner, 8, clip_norm=0.5)
        own = flat(modules[backend.rank // size])
        torch.testing.assert_close(flat(replica.module), own, rtol=1e-11, atol=1e-12)
        everyone = backend.all_gather(flat(replica.module))
        for first in range(0, backend.world_size, size):
            assert all(torch.equal(everyone[first], one) for one in everyone[first : first + size])
        with replica.shared_weights():
            shared = flat(replica.module)
        assert all(torch.equal(shared, one) for one in backend.all_gather(shared))
        replica.settle()
        assert torch.equal(flat(replica.module), shared)


@pytest.mark.feature("sync")
def test_an_exchange_between_groups_after_every_step_is_plain_sgd(backend, reference):
    for size in [*divided(backend), "node"]:
        replica = grouped(backend, "local-sgd:1", "SGD", size)
        plain = made()
        one = reference.replicate(plain, INNER["SGD"](plain.parameters()))
        for step in range(4):
            take_step(backend, replica, step, total=step % 2 == 1)
            for rank, count in enumerate(sizes_of(backend.world_size, step)):
                if count:
                    with one.accumulate(last=False):
                        one.backward(loss_of(plain, *batch(rank, step, count)), samples=count)
            one.step()
        assert float((flat(replica.module) - flat(plain)).abs().max()) < 1e-12


@pytest.mark.feature("sync")
@pytest.mark.parametrize("sync", ["diloco:3", "diloco:3,delay=2", "diloco:4,delay=1,fragments=2"])
def test_groups_of_one_are_no_groups(backend, sync):
    ends = []
    for size in (None, 1):
        replica = grouped(backend, sync, "AdamW", size)
        for step in range(9):
            take_step(backend, replica, step)
        replica.settle()
        ends.append(flat(replica.module))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-13)


@pytest.mark.costly(1)
@pytest.mark.feature("sync")
@pytest.mark.parametrize("compression", [None, "topk:0.2", "powersgd:1"])
def test_a_run_of_groups_goes_on_bit_for_bit(backend, tmp_path, compression):
    folder = backend.broadcast_object(str(tmp_path))
    for size in divided(backend):

        def looped(size=size):
            replica = grouped(backend, "diloco:4,delay=2", "AdamW", size, compression=compression)
            return replica, hvdtrain.LoopState(backend, replica)

        whole, _ = looped()
        saved, state = looped()
        for step in range(11):
            take_step(backend, whole, step)
            if step < 5:
                take_step(backend, saved, step)
        state.save(hvdtrain.Checkpoints(f"{folder}/{size}"), 5)
        resumed, state = looped()
        assert state.load(hvdtrain.Checkpoints(f"{folder}/{size}")) == 5
        for step in range(5, 11):
            take_step(backend, resumed, step)
        assert torch.equal(flat(resumed.module), flat(whole.module))
        saved.settle()


@pytest.mark.feature("compression")
@pytest.mark.parametrize("total", [False, True], ids=["counted", "total"])
@pytest.mark.parametrize("compression", ["topk:1", "randomk:1"])
def test_gradients_of_groups_are_exact_where_nothing_is_left_out(backend, compression, total):
    for size in [*divided(backend), "node"]:
        replica = replicated(backend, compression, sync_group=size)
        for step in range(3):
            gradients = exchange(backend, replica, step, total=total)
            for gradient, whole in zip(gradients, exact(backend, step), strict=True):
                assert float((gradient - whole).abs().max()) < 1e-12
            replica.step()


@pytest.mark.costly(2)
@pytest.mark.feature("compression")
@pytest.mark.parametrize("compression", ["1bit", "topk:0.1", "randomk:0.1", "powersgd:1"])
def test_what_groups_have_not_sent_is_sent_later(backend, compression):
    for size in divided(backend):
        replica = replicated(backend, compression, sync_group=size)
        names = [name for name, _ in replica.module.named_parameters()]
        received = [torch.zeros_like(p) for p in replica.module.parameters()]
        wanted = [torch.zeros_like(p) for p in replica.module.parameters()]
        for step in range(4):
            for at, (gradient, whole) in enumerate(
                zip(exchange(backend, replica, step), exact(backend, step), strict=True)
            ):
                received[at] += gradient
                wanted[at] += whole
            everyone = backend.all_gather(torch.cat([p.grad.flatten() for p in replica.module.parameters()]))
            assert all(torch.equal(everyone[0], one) for one in everyone)
            replica.step()
        speaks = backend.rank % size == 0
        mine = replica.rank_state()
        assert bool(mine.get("rests")) == (speaks and backend.world_size > size)
        states = [state.get("rests", {}) for state in backend.all_gather_object(mine)]
        for name, have, want in zip(names, received, wanted, strict=True):
            left = [state[name] for state in states if name in state]
            torch.testing.assert_close(have + sum(left, torch.zeros_like(have)), want, rtol=1e-6, atol=1e-7)


@pytest.mark.feature("compression")
def test_rests_go_to_the_ranks_that_speak_when_groups_change(backend):
    flat_replica = replicated(backend, "topk:0.1")
    exchange(backend, flat_replica, 0)
    flat_replica.step()
    states = backend.all_gather_object(flat_replica.rank_state())
    before = rests(backend, flat_replica) if backend.world_size > 1 else {}
    for size in divided(backend):
        replica = replicated(backend, "topk:0.1", sync_group=size)
        replica.load_rank_states(states)
        mine = replica.rank_state().get("rests", {})
        assert bool(mine) == (backend.rank % size == 0 and backend.world_size > 1)
        everyones = backend.all_gather_object(mine)
        for name, rest in before.items():
            now = sum((one[name] for one in everyones if name in one), torch.zeros_like(rest))
            torch.testing.assert_close(now, rest, rtol=1e-12, atol=1e-14)


@pytest.mark.feature("compression")
def test_a_number_that_is_not_finite_is_seen_by_all_groups(backend):
    for size in divided(backend):
        replica = replicated(backend, "topk:0.1", torch.float32, sync_group=size)
        x, y = batch_of_images(backend, 0)
        exchange(backend, replica, 0, torch.float32)
        replica.step()
        before = replica.rank_state()
        weight = replica.module[3].weight
        last = backend.rank == backend.world_size - 1
        hook = weight.register_hook(lambda g, last=last: g * float("nan") if last else g)
        replica.backward(loss_of(replica.model, x, y), samples=4)
        hook.remove()
        assert replica.step(skip_nonfinite=True).skipped
        assert str(replica.rank_state().get("rests")) == str(before.get("rests"))


def batch_of_images(backend, step):
    generator = torch.Generator().manual_seed(1000 * step + backend.rank)
    return torch.randn(4, 1, 6, 6, generator=generator), torch.arange(4) % 3


@pytest.mark.feature("sync")
def test_groups_that_cannot_be_are_refused(backend):
    n = backend.world_size
    with pytest.raises(ConfigError, match=r"sync_group must be none, node or a number of ranks from 1, got 'nodes'"):
        grouped(backend, "local-sgd:2", "SGD", "nodes")
    with pytest.raises(ConfigError, match=r"number of ranks from 1, got 0"):
        grouped(backend, "local-sgd:2", "SGD", 0)
    if n > 1:
        with pytest.raises(ConfigError, match=rf"sync_group={n + 1} \(--sync-group\) does not divide {n} ranks"):
            grouped(backend, "local-sgd:2", "SGD", n + 1)
    for options in ({}, {"compression": "bf16"}):
        with pytest.raises(ConfigError, match=r"nothing is said to be: give sync= \(--sync\) or compression="):
            backend.replicate(made(torch.float32), sync_group="node", **options)
    if n > 1:
        with pytest.raises(ModelMismatch, match="setting sync_group"):
            grouped(backend, "local-sgd:2", "SGD", 1 if backend.rank else n)
