"""A model of bfloat16 whose optimizer works on float32 masters: small updates add up, on every rank alike."""

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.feature("precision")

MAKERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-4),
    "AdamW-fused": lambda ps: torch.optim.AdamW(ps, lr=1e-4, fused=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-4),  # has a state before its first step
}


def made(seed=1, dtype=torch.bfloat16):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 11), nn.LayerNorm(11), nn.Tanh(), nn.Linear(11, 3)).to(dtype)


def wrapped(backend, optimizer, sharded):
    masters = hvdtrain.MasterWeights(optimizer)
    return hvdtrain.ShardedOptimizer(masters, backend) if sharded else masters


def masters_of(optimizer):
    return [state["master_weight"] for _, state in sorted(optimizer.state_dict()["state"].items())]


def all_equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize(
    ("kind", "sharded"),
    [("SGD", False), ("AdamW", True), ("AdamW-fused", False), ("AdamW-fused", True), ("Adagrad", True)],
)
def test_masters_are_what_the_plain_optimizer_makes_of_the_same_gradients_in_float32(backend, kind, sharded):
    model = made(seed=backend.rank + 1)  # the ranks begin with rank 0's
    replica = backend.replicate(model, wrapped(backend, MAKERS[kind](model.parameters()), sharded))
    plain = made().float()
    expected, lost = MAKERS[kind](plain.parameters()), made()
    naive = MAKERS[kind](lost.parameters())
    for step in range(12):
        x = torch.sin(torch.arange(12.0).reshape(2, 6) * (backend.rank + step + 1)).bfloat16()
        replica.backward(model(x).float().square().mean(), samples=2)
        replica.reduce_gradients()
        for ours, theirs, third in zip(model.parameters(), plain.parameters(), lost.parameters(), strict=True):
            theirs.grad, third.grad = ours.grad.float(), ours.grad.clone()
        expected.step()
        naive.step()
        replica.step()
    # What a fused optimizer makes of a number depends, in its last bit, on where in the memory that number lies.
    last_bit = 1e-6 if sharded and "fused" in kind else 0.0
    for master, number in zip(masters_of(replica.optimizer), plain.parameters(), strict=True):
        torch.testing.assert_close(master, number.detach(), rtol=last_bit, atol=last_bit)
    assert all_equal(model.parameters(), [master.bfloat16() for master in masters_of(replica.optimizer)])
    assert not all_equal(model.parameters(), lost.parameters())  # without masters something would be lost


def test_updates_too_small_for_bfloat16_add_up(backend):
    model = nn.Linear(4, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    replica = backend.replicate(model, hvdtrain.MasterWeights(torch.optim.SGD(model.parameters(), lr=2.0**-10)))
    for _ in range(64):  # each moves a weight by 2**-10 from 1, where bfloat16 has a number every 2**-8
        replica.backward(model(torch.ones(1, 4, dtype=torch.bfloat16)).sum(), samples=1, total=backend.world_size)
        replica.step()
    assert torch.equal(model.weight, torch.full_like(model.weight, 1 - 64 * 2.0**-10))


def test_a_clipped_gradient_has_its_norm_in_float32(backend):
    model = made()
    replica = backend.replicate(model, hvdtrain.MasterWeights(torch.optim.SGD(model.parameters(), lr=0.1)))
    x = torch.sin(torch.arange(12.0).reshape(2, 6) * (backend.rank + 1)).bfloat16()
    replica.backward(model(x).float().square().mean() * 100, samples=2)
    replica.reduce_gradients()
    exact = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
    assert exact > 1
    norm = replica.step(clip_norm=1.0).gradient_norm
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


def test_a_parameter_that_somebody_writes_to_is_followed(backend):
    model = made()
    optimizer = hvdtrain.MasterWeights(torch.optim.SGD(model.parameters(), lr=0.0))
    replica = backend.replicate(model, optimizer)
    with torch.no_grad():
        model[0].weight[0] = 3.0
    replica.backward(model(torch.ones(1, 6, dtype=torch.bfloat16)).float().sum(), samples=1)
    replica.step()
    assert bool((model[0].weight[0] == 3).all())
    assert bool((masters_of(optimizer)[0][0] == 3).all())


def test_a_group_that_is_added_later_has_masters(backend):
    model = made()
    optimizer = hvdtrain.MasterWeights(torch.optim.SGD(model[0].parameters(), lr=2.0**-12))
    replica = backend.replicate(model, optimizer)
    optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 2.0**-11})
    before = [p.detach().clone() for p in model[3].parameters()]
    for _ in range(40):
        replica.backward(model(torch.ones(1, 6, dtype=torch.bfloat16)).float().sum(), samples=1)
        replica.step()
    assert len(masters_of(optimizer)) == 4
    assert not torch.equal(before[1], model[3].bias)


def data(n):
    torch.manual_seed(2)
    return ArrayDataset(torch.randn(n, 6), torch.arange(n) % 3)


def trained(backend, sharded=False, folder=None, reduce_dtype=None, **fit):
    torch.manual_seed(3)
    model = made(dtype=torch.float32)
    optimizer = wrapped(backend, torch.optim.AdamW(model.parameters(), lr=1e-3), sharded)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    checkpoints = None if folder is None else hvdtrain.Checkpoints(folder)
    trainer = hvdtrain.Trainer(
        backend, model, optimizer, loss=nn.functional.cross_entropy, schedule=schedule, clip_norm=0.5, accumulate=2,
        precision="bf16-pure", checkpoints=checkpoints, reduce_dtype=reduce_dtype,
    )  # fmt: skip
    n = backend.world_size
    trainer.fit(data(12 * n), data(5), epochs=2, global_batch_size=3 * n, **fit)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    return model, masters_of(optimizer), None if checkpoints is None else checkpoints.find(backend)


@pytest.mark.costly(2)
@pytest.mark.parametrize(("before", "after"), [(False, False), (True, False), (False, True)])
def test_a_run_goes_on_bit_for_bit_from_whole_and_from_cut_masters(backend, tmp_path_factory, before, after):
    folder = backend.broadcast_object(str(tmp_path_factory.mktemp("run")) if backend.rank == 0 else None)
    model, masters, _ = trained(backend, after)
    _, _, found = trained(backend, before, folder, max_steps=5)
    again, resumed, _ = trained(backend, after, resume_from=found)
    assert all_equal(model.parameters(), again.parameters())
    assert all_equal(masters, resumed)


def test_gradients_can_travel_in_float32(backend):
    _, masters, _ = trained(backend, reduce_dtype="fp32")
    assert all(torch.isfinite(master).all() for master in masters)
    assert all_equal(masters, [backend.broadcast(master) for master in masters])


def test_a_plain_optimizer_does_not_read_masters(backend, tmp_path_factory):
    folder = backend.broadcast_object(str(tmp_path_factory.mktemp("run")) if backend.rank == 0 else None)
    _, _, found = trained(backend, folder=folder, max_steps=2)
    model = made(dtype=torch.float32)
    trainer = hvdtrain.Trainer(backend, model, torch.optim.AdamW(model.parameters()), loss=nn.functional.cross_entropy)
    with pytest.raises(CheckpointError):
        trainer.fit(data(12), epochs=2, global_batch_size=3, resume_from=found)


def test_what_would_lose_updates_or_masters_is_refused(backend):
    model = made(dtype=torch.float32)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"hvdtrain.MasterWeights\(optimizer\)"):
        hvdtrain.Trainer(backend, model, plain, loss=nn.functional.mse_loss, precision="bf16-pure")
    with pytest.raises(ConfigError, match="wrap it in the other order"):
        hvdtrain.MasterWeights(hvdtrain.ShardedOptimizer(plain, backend))
    torch.optim.lr_scheduler.StepLR(plain, 1)
    with pytest.raises(ConfigError, match="a schedule holds this optimizer already"):
        hvdtrain.MasterWeights(plain)
    matrix = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ConfigError, match="LBFGS may look at a parameter as a whole"):
        hvdtrain.ShardedOptimizer(hvdtrain.MasterWeights(matrix), backend)
