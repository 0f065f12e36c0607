"""Ranks that train apart for some steps: against the same arithmetic in one process, and what evaluations and checkpoints mean."""

import copy

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import CollectiveError, ConfigError, ModelMismatch, TrainingError

pytestmark = pytest.mark.feature("sync")

INNER = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
}


def made(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def batch(rank, step, samples):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(samples, 6, generator=generator, dtype=torch.float64), torch.arange(samples) % 3


def sizes_of(world_size, step, *, even=False):
    """Samples of each rank; none on the last one in the second step."""
    if even:
        return [4] * world_size
    empty = world_size > 1 and step == 1
    return [0 if empty and rank == world_size - 1 else 2 + (rank + 2 * step) % 4 for rank in range(world_size)]


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x), y)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(backend, sync, inner, steps, *, total=False, even=False, clip_norm=None):
    model = made()
    replica = backend.replicate(model, INNER[inner](model.parameters()), sync=sync)
    for step in range(steps):
        take_step(backend, replica, step, total=total, even=even, clip_norm=clip_norm)
    return replica


def take_step(backend, replica, step, *, total=False, even=False, clip_norm=None):
    sizes = sizes_of(backend.world_size, step, even=even)
    if size := sizes[backend.rank]:
        loss = loss_of(replica.model, *batch(backend.rank, step, size))
        replica.backward(loss, samples=size, total=sum(sizes) if total else None)
    replica.step(clip_norm=clip_norm)


def by_hand(world_size, period, inner, steps, outer=None, clip_norm=None):
    """All ranks in this process: the models, apart, and the common weights after the last exchange."""
    models = [made() for _ in range(world_size)]
    optimizers = [INNER[inner](model.parameters()) for model in models]
    common = made()
    outer_optimizer = (
        None
        if outer is None
        else torch.optim.SGD(common.parameters(), lr=outer[0], momentum=outer[1], nesterov=outer[1] > 0)
    )
    seen = [0] * world_size
    for step in range(steps):
        for rank, size in enumerate(sizes_of(world_size, step)):
            optimizers[rank].zero_grad()
            if size:
                loss_of(models[rank], *batch(rank, step, size)).backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(models[rank].parameters(), clip_norm)
            optimizers[rank].step()
            seen[rank] += size
        if (step + 1) % period == 0:
            agree(common, models, seen, outer_optimizer)
            seen = [0] * world_size
    return models, common


@torch.no_grad()
def agree(common, models, seen, outer_optimizer):
    for number, parameter in enumerate(common.parameters()):
        of_ranks = [list(model.parameters())[number] for model in models]
        average = sum(p * (count / sum(seen)) for p, count in zip(of_ranks, seen, strict=True))
        if outer_optimizer is None:
            parameter.copy_(average)
        else:
            parameter.grad = parameter - average
    if outer_optimizer is not None:
        outer_optimizer.step()
    for model in models:
        model.load_state_dict(common.state_dict())


@pytest.mark.parametrize("total", [False, True], ids=["counted", "total"])
def test_an_exchange_after_every_step_is_plain_sgd_also_of_uneven_shares(backend, reference, total):
    replica = trained(backend, "local-sgd:1", "SGD", 4, total=total)
    plain = made()
    optimizer = INNER["SGD"](plain.parameters())
    one = reference.replicate(plain, optimizer)
    for step in range(4):
        sizes = sizes_of(backend.world_size, step)
        for rank, size in enumerate(sizes):
            if size:
                with one.accumulate(last=False):
                    one.backward(loss_of(plain, *batch(rank, step, size)), samples=size)
        one.step()
    assert float((flat(replica.module) - flat(plain)).abs().max()) < 1e-12


def test_an_exchange_after_every_step_is_plain_sgd_with_momentum_of_even_shares(backend):
    seldom = trained(backend, "local-sgd:1", "momentum", 5, even=True)
    plain = trained(backend, None, "momentum", 5, even=True)
    assert float((flat(seldom.module) - flat(plain.module)).abs().max()) < 1e-12


@pytest.mark.parametrize("inner", list(INNER))
@pytest.mark.parametrize("total", [False, True], ids=["counted", "total"])
def test_local_sgd_is_the_average_weighted_by_samples_and_apart_in_between(backend, inner, total):
    replica = trained(backend, "local-sgd:3", inner, 7, total=total, clip_norm=0.5)
    models, _ = by_hand(backend.world_size, 3, inner, 7, clip_norm=0.5)
    torch.testing.assert_close(flat(replica.module), flat(models[backend.rank]), rtol=1e-11, atol=1e-13)
    if backend.world_size > 1:
        assert len({tuple(row.tolist()) for row in backend.all_gather(flat(replica.module))}) == backend.world_size


@pytest.mark.parametrize(("sync", "outer"), [("diloco:2", (0.7, 0.9)), (hvdtrain.Sync(2, 0.5, 0.0), (0.5, 0.0))])
@pytest.mark.parametrize("inner", ["SGD", "AdamW"])
def test_diloco_is_torchs_nesterov_on_the_way_to_the_average(backend, sync, outer, inner):
    replica = trained(backend, sync, inner, 6)
    _, common = by_hand(backend.world_size, 2, inner, 6, outer)
    torch.testing.assert_close(flat(replica.module), flat(common), rtol=1e-10, atol=1e-12)


def test_diloco_without_outer_momentum_and_with_rate_1_is_parameter_averaging(backend):
    plain = trained(backend, hvdtrain.Sync(1, 1.0, 0.0), "AdamW", 3)
    _, common = by_hand(backend.world_size, 1, "AdamW", 3)
    torch.testing.assert_close(flat(plain.module), flat(common), rtol=1e-11, atol=1e-13)


def test_nothing_is_sent_between_exchanges(backend):
    replica = trained(backend, "diloco:4", "AdamW", 4)
    before = backend.traffic.sent_bytes
    for step in range(4, 7):
        take_step(backend, replica, step)
    assert backend.traffic.sent_bytes == before
    take_step(backend, replica, 7)
    n = backend.world_size
    whole = 2 * 8 * flat(replica.module).numel() * (n - 1) / n
    assert backend.traffic.sent_bytes - before == pytest.approx(whole + 32 * (n - 1), abs=300 * (n > 1))


@pytest.mark.parametrize("sync", ["local-sgd:3", "diloco:3"])
def test_shared_weights_are_the_ranks_average_and_go_again(backend, sync):
    replica = trained(backend, sync, "AdamW", 5)
    own = flat(replica.module)
    with replica.shared_weights():
        shared = flat(replica.module)
        assert all(torch.equal(shared, other) for other in backend.all_gather(shared))
    assert torch.equal(flat(replica.module), own)
    seen = [sum(sizes_of(backend.world_size, step)[rank] for step in (3, 4)) for rank in range(backend.world_size)]
    of_ranks = backend.all_gather(own)
    average = sum(one * (count / sum(seen)) for one, count in zip(of_ranks, seen, strict=True))
    torch.testing.assert_close(shared, average, rtol=1e-11, atol=1e-13)
    assert bool((shared - own).abs().max() > 1e-6) == (backend.world_size > 1)
    replica.settle()
    torch.testing.assert_close(flat(replica.module), shared, rtol=0, atol=0)
    with replica.shared_weights():
        assert torch.equal(flat(replica.module), shared)


def test_a_ranks_own_weights_are_known_inside_a_block_of_shared_ones_too(backend):
    replica = trained(backend, "local-sgd:3", "SGD", 4)
    own = replica.rank_state()["own"]
    with replica.shared_weights():
        inside = replica.rank_state()["own"]
    assert own.keys() == inside.keys()
    assert all(torch.equal(inside[name], weights) for name, weights in own.items())


def test_blocks_of_shared_weights_may_be_nested_and_train_nothing(backend):
    replica = trained(backend, "diloco:3", "AdamW", 2)
    own = flat(replica.module)
    with replica.shared_weights():
        shared = flat(replica.module)
        with replica.shared_weights():
            assert torch.equal(flat(replica.module), shared)
        assert torch.equal(flat(replica.module), shared)
    assert torch.equal(flat(replica.module), own)


@pytest.mark.parametrize("steps", [2, 3], ids=["apart", "alike"])
def test_inside_a_block_of_shared_weights_nothing_changes_weights(backend, steps):
    replica = trained(backend, "local-sgd:3", "AdamW", steps)
    own, whole = flat(replica.module), replica.whole_state()
    states = backend.all_gather_object(replica.rank_state())
    acts = (
        lambda: replica.backward(loss_of(replica.model, *batch(0, 0, 2)), samples=2),
        replica.step,
        replica.settle,
        replica.copy_from_rank_zero,
        lambda: replica.load_whole_state(whole),
        lambda: replica.load_rank_states(states),
    )
    with replica.shared_weights():
        for act in acts:
            with pytest.raises(
                TrainingError, match=r"inside replica.shared_weights\(\) would change weights that are put back"
            ):
                act()
    assert torch.equal(flat(replica.module), own)


def test_inside_a_block_of_shared_weights_the_optimizer_does_not_step_by_itself_either(backend):
    replica = trained(backend, "local-sgd:3", "SGD", 2)
    replica.backward(loss_of(replica.model, *batch(backend.rank, 2, 4)), samples=4)
    replica.reduce_gradients()
    with (
        replica.shared_weights(),
        pytest.raises(TrainingError, match=r"optimizer\.step\(\) inside replica.shared_weights\(\) would change"),
    ):
        replica.optimizer.step()
    replica.optimizer.step()
    now = flat(replica.module)
    assert all(torch.equal(now, one) for one in backend.all_gather(now))


@pytest.mark.parametrize("act", ["settle", "shared_weights"])
def test_ranks_that_have_taken_other_steps_are_named_where_they_meet(backend, act):
    replica = trained(backend, "diloco:4,delay=2", "AdamW", 5)
    last = backend.world_size > 1 and backend.rank == backend.world_size - 1
    for step in range(5, 8):
        if last and step == 6:
            continue
        take_step(backend, replica, step, even=True)

    def meet():
        if act == "settle":
            replica.settle()
        else:
            with replica.shared_weights():
                pass

    if backend.world_size > 1:
        behind = backend.world_size - 1
        with pytest.raises(CollectiveError, match=rf"{act}\(\) after step 8, and rank {behind} at .* after step 7"):
            meet()
    if last:
        take_step(backend, replica, 7, even=True)
    meet()  # nothing was lost
    replica.settle()
    now = flat(replica.module)
    assert all(torch.equal(now, one) for one in backend.all_gather(now))


def test_losses_may_say_their_total_in_some_steps_alone(backend):
    ends = []
    for totals in ([False] * 7, [True, False, True, True, False, False, True]):
        model = made()
        replica = backend.replicate(model, INNER["AdamW"](model.parameters()), sync="local-sgd:3")
        for step, total in enumerate(totals):
            take_step(backend, replica, step, total=total)
        replica.settle()
        ends.append(flat(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-11, atol=1e-13)


def fitted(backend, folder, epochs, sync, *, resume=False, max_steps=None, evaluated=None):
    torch.manual_seed(1)
    model = made(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    checkpoints = None if folder is None else hvdtrain.Checkpoints(folder)
    trainer = hvdtrain.Trainer(
        backend, model, optimizer, loss=nn.functional.cross_entropy, schedule=schedule, checkpoints=checkpoints, sync=sync,
        clip_norm=1.0, accumulate=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    data = ArrayDataset(torch.randn(26, 6, generator=generator), torch.arange(26) % 3)
    start = checkpoints.find(backend) if resume else None
    result = trainer.fit(data, data, epochs=epochs, max_steps=max_steps, global_batch_size=7, resume_from=start)
    return flat(model), result, trainer


@pytest.mark.costly(1)
@pytest.mark.parametrize("sync", ["local-sgd:3", "diloco:3"])
def test_a_run_goes_on_bit_for_bit_from_between_two_exchanges(backend, tmp_path, sync):
    folder = backend.broadcast_object(str(tmp_path))
    whole, result, trainer = fitted(backend, None, 4, sync)
    assert all(torch.equal(whole, other) for other in backend.all_gather(whole))  # fit ends with an exchange
    assert trainer.evaluate(ArrayDataset(torch.ones(3, 6), torch.arange(3)))
    fitted(backend, folder, 2, sync)  # 8 steps
    resumed, again, _ = fitted(backend, folder, 4, sync, resume=True)
    assert torch.equal(whole, resumed)
    assert again.eval_metrics == result.eval_metrics


@pytest.mark.parametrize("compiled", [True, False], ids=["by compiled", "by plain"])
def test_a_run_goes_on_whether_the_model_is_compiled_or_not(backend, tmp_path, compiled):
    folder = backend.broadcast_object(str(tmp_path))

    def looped(wrapped):
        model = made()
        whole = torch.compile(model, backend="eager") if wrapped else model
        replica = backend.replicate(whole, torch.optim.SGD(whole.parameters(), lr=0.1), sync="diloco:2")
        return replica, model, hvdtrain.LoopState(backend, replica)

    before, model, state = looped(compiled)
    for step in range(3):
        take_step(backend, before, step)
    state.save(hvdtrain.Checkpoints(folder), 3)
    after, other, state = looped(not compiled)
    assert state.load(hvdtrain.Checkpoints(folder)) == 3
    assert torch.equal(flat(model), flat(other))
    for replica in (before, after):
        take_step(backend, replica, 3)
    assert torch.equal(flat(model), flat(other))


def test_a_checkpoint_holds_the_common_weights_which_another_way_of_training_goes_on_from(backend, tmp_path):
    folder = backend.broadcast_object(str(tmp_path))
    _, result, trainer = fitted(backend, folder, 2, "local-sgd:5")
    other = made(torch.float32)
    state = hvdtrain.LoopState(backend, backend.replicate(other, torch.optim.AdamW(other.parameters())), schedule=None)
    assert state.load(hvdtrain.Checkpoints(folder)) == result.steps
    assert torch.equal(flat(other), flat(trainer.replica.module))  # after fit's own last exchange
    again = backend.replicate(other, trainer.replica.optimizer.__class__(other.parameters()), sync="diloco:2")
    hvdtrain.LoopState(backend, again).load(hvdtrain.Checkpoints(folder))
    with again.shared_weights():
        assert torch.equal(flat(other), flat(trainer.replica.module))


def test_states_of_another_number_of_ranks_are_left_out(backend):
    replica = trained(backend, "diloco:3", "AdamW", 5)
    state = replica.rank_state()
    with replica.shared_weights():
        shared = flat(replica.module)
    fresh = made()
    other = backend.replicate(fresh, INNER["AdamW"](fresh.parameters()), sync="diloco:3")
    torch.nn.utils.vector_to_parameters(shared, fresh.parameters())
    other.load_rank_states([copy.deepcopy(state)] * (backend.world_size + 1))
    assert other.rank_state()["counts"][0][1] == 0
    assert other.rank_state()["momentum"].keys() == state["momentum"].keys()
    take_step(backend, other, 0)
    with other.shared_weights():
        now = flat(fresh)
    assert all(torch.equal(now, one) for one in backend.all_gather(now))


def test_a_parameter_that_is_unfrozen_meanwhile_is_exchanged_too(backend):
    model = made()
    model[0].requires_grad_(False)
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), sync="local-sgd:2")
    take_step(backend, replica, 0, even=True)
    model[0].requires_grad_(True)
    for step in (1, 2, 3):
        take_step(backend, replica, step, even=True)
    now = flat(model)
    assert all(torch.equal(now, one) for one in backend.all_gather(now))


def test_sums_are_refused_where_they_cannot_be_averaged(backend):
    model = made()
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), sync="local-sgd:2")

    def step():
        x, y = batch(backend.rank, 0, 4)
        replica.backward(nn.functional.cross_entropy(model(x), y, reduction="sum"), samples=4, weight=1, total=1)
        replica.step()

    step()
    if backend.world_size == 1:
        step()
        return
    with pytest.raises(TrainingError, match=r"add up to .* and their total= to"):
        step()


def test_a_model_in_whose_backward_pass_ranks_meet_is_refused(backend):
    model = hvdtrain.convert_sync_batch_norm(
        nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), backend
    )
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), sync="local-sgd:2")
    loss = nn.functional.cross_entropy(model(torch.randn(4, 6)), torch.arange(4) % 3)
    if backend.world_size == 1:
        return
    with pytest.raises(
        TrainingError,
        match=r"sync= .* in which ranks exchange gradients.* exclude each other: each rank trains by itself",
    ):
        replica.backward(loss, samples=4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sync": "local-sgd:0"}, r"'local-sgd:0': give the steps between exchanges, local-sgd:100"),
        ({"sync": "diloco"}, r"'diloco': give the steps between exchanges"),
        (
            {"sync": "dilocco:3"},
            r"must be one of every-step, local-sgd:STEPS, diloco:STEPS, got .*did you mean 'diloco'",
        ),
        ({"sync": "local-sgd:2", "reduce_dtype": "bf16"}, r"and reduce_dtype= \(--reduce-dtype\) exclude each other"),
    ],
)
def test_what_there_is_not_is_refused(backend, options, said):
    model = made(torch.float32)
    with pytest.raises(ConfigError, match=said):
        backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_what_needs_equal_steps_is_refused(backend):
    model = made(torch.float32)
    with pytest.raises(ConfigError, match="made without one"):
        backend.replicate(model, sync="local-sgd:2")
    sharded = hvdtrain.ShardedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), backend)
    with pytest.raises(ConfigError, match=r"sync= \(--sync\) and a ShardedOptimizer"):
        backend.replicate(model, sharded, sync="local-sgd:2")
    narrow = made(torch.bfloat16)
    masters = hvdtrain.MasterWeights(torch.optim.SGD(narrow.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match=r"MasterWeights .* exclude each other: an exchange of the 16-bit weights"):
        backend.replicate(narrow, masters, sync="local-sgd:2")
    replica = backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), sync="local-sgd:2")
    with pytest.raises(ConfigError, match=r"GradScaler .* exclude each other: each rank would skip steps by itself"):
        replica.step(scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigError, match="exclude each other: a rank would skip a step by itself"):
        replica.step(skip_nonfinite=True)


def test_ranks_that_ask_for_different_ones_are_told(backend):
    if backend.world_size == 1:
        return
    model = made()
    with pytest.raises(ModelMismatch, match="setting sync"):
        backend.replicate(
            model, torch.optim.SGD(model.parameters(), lr=0.1), sync=f"local-sgd:{1 + (backend.rank > 0)}"
        )
