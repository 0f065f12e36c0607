"""An optimizer whose state is cut over the ranks trains as the plain one does, and goes on from its checkpoints."""

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset

pytestmark = pytest.mark.feature("sharded optimizer")


def made():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 11), nn.LayerNorm(11), nn.Tanh(), nn.Linear(11, 3))


def data(n):
    torch.manual_seed(2)
    return ArrayDataset(torch.randn(n, 6), torch.arange(n) % 3)


def trained(backend, sharded, folder=None, **fit):
    torch.manual_seed(3)
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if sharded:
        optimizer = hvdtrain.ShardedOptimizer(optimizer, backend)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    checkpoints = None if folder is None else hvdtrain.Checkpoints(folder)
    trainer = hvdtrain.Trainer(
        backend, model, optimizer, loss=nn.functional.cross_entropy, schedule=schedule, clip_norm=0.5, accumulate=2,
        checkpoints=checkpoints,
    )  # fmt: skip
    n = backend.world_size
    trainer.fit(data(12 * n), data(5), epochs=2, global_batch_size=3 * n, **fit)
    return model, None if checkpoints is None else checkpoints.find(backend)


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_training_is_the_same_bit_for_bit(backend):
    plain, _ = trained(backend, False)
    sharded, _ = trained(backend, True)
    assert same(plain, sharded)


@pytest.mark.costly(2)
@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
def test_it_goes_on_from_either_kind_of_checkpoint(backend, tmp_path_factory, before, after):
    folder = backend.broadcast_object(str(tmp_path_factory.mktemp("run")) if backend.rank == 0 else None)
    plain, _ = trained(backend, False)
    _, found = trained(backend, before, folder, max_steps=5)
    resumed, _ = trained(backend, after, resume_from=found)
    assert same(plain, resumed)


def test_a_scaler_skips_and_steps_as_with_the_plain_one(backend):
    models = []
    for sharded in (False, True):
        model = made()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if sharded:
            optimizer = hvdtrain.ShardedOptimizer(optimizer, backend)
        replica = backend.replicate(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        skipped = []
        for step in range(4):
            x = torch.full((3, 6), 1e30 if step == 1 else 0.1 * (backend.rank + 1 + step)) + torch.arange(3).unsqueeze(
                1
            )
            replica.backward(scaler.scale(model(x).square().mean() * (torch.inf if step == 1 else 1)), samples=3)
            skipped.append(replica.step(scaler=scaler, clip_norm=1.0).skipped)
        assert skipped == [False, True, False, False]
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


def test_rank_zero_alone_gathers_the_whole_state_to_save_it(backend):
    states = []
    for sharded in (False, True):
        model = made()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        if sharded:
            optimizer = hvdtrain.ShardedOptimizer(optimizer, backend)
        replica = backend.replicate(model, optimizer)
        replica.backward(model(torch.full((2, 6), 1.0 + backend.rank)).square().mean(), samples=2)
        replica.step()
        if sharded:
            assert bool(optimizer.state_on_rank_zero()["state"]) == (backend.rank == 0)
            assert len(optimizer.state_dict()["state"]) == 6
        states.append(replica.whole_state())  # every rank calls it, and rank 0 has it
    plain, sharded = states
    assert bool(plain) == bool(sharded) == (backend.rank == 0)
    for index, state in plain.get("optimizer", {}).get("state", {}).items():
        for name, value in state.items():
            assert torch.equal(sharded["optimizer"]["state"][index][name], value)
