"""Ranks that trained apart go on in other groups, or train other parameters: what is exchanged by then is the same on all of them."""

import pytest
import torch

import hvdtrain
from hvdtrain.testing.conformance.test_sync import flat, made, take_step

pytestmark = pytest.mark.feature("sync")

SYNCS = ["local-sgd:3", "diloco:4,delay=2", "diloco:4,fragments=2", "diloco:5,delay=3,fragments=3"]


def looped(backend, sync, *, frozen=False, group=None):
    model = made()
    model[0].requires_grad_(not frozen)
    replica = backend.replicate(model, torch.optim.AdamW(model.parameters(), lr=0.1), sync=sync, sync_group=group)
    return replica, hvdtrain.LoopState(backend, replica)


def alike(backend, model):
    now = flat(model)
    return all(torch.equal(now, one) for one in backend.all_gather(now))


def gone_on(backend, folder, sync, before, after):
    """A replica that has gone on, after 4 steps of another, and the weights that both meant then."""
    saved, state = looped(backend, sync, **before)
    for step in range(4):
        take_step(backend, saved, step, even=True)
    state.save(hvdtrain.Checkpoints(folder), 4)
    with saved.shared_weights():
        meant = flat(saved.module)
    saved.settle()
    replica, state = looped(backend, sync, **after)
    assert state.load(hvdtrain.Checkpoints(folder)) == 4
    with replica.shared_weights():
        torch.testing.assert_close(flat(replica.module), meant, rtol=1e-12, atol=1e-14)
    return replica


WAYS = {
    "plain": {},
    "int8": {"compression": "int8"},
    "topk": {"compression": "topk:0.1"},
    "sync": {"sync": "local-sgd:2"},
    "sync and topk": {"sync": "local-sgd:2", "compression": "topk:0.1"},
}


@pytest.mark.parametrize("after", WAYS)
@pytest.mark.parametrize("before", WAYS)
def test_what_a_compression_had_not_sent_is_said_to_be_lost_where_it_is(backend, logged, before, after):
    replicas = []
    for way in (before, after):
        model = made()
        replicas.append(backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), **WAYS[way]))
    for step in range(2):
        take_step(backend, replicas[0], step)
    states = backend.all_gather_object(replicas[0].rank_state())
    replicas[1].load_rank_states(states)
    said = [message for message in logged if "they are lost" in message]
    kept = "topk" in before and backend.world_size > 1
    goes_on = "topk" in after or after == "int8"
    assert bool(said) == (kept and not (goes_on and ("sync" in before) == ("sync" in after)))
    assert all(("weights" if "sync" in before else "gradients") in one for one in said)


@pytest.mark.costly(2)
@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("frozen", [True, False], ids=["unfrozen", "frozen"])
def test_a_run_that_trains_other_parameters_than_before_exchanges_them(backend, tmp_path, sync, frozen):
    folder = backend.broadcast_object(str(tmp_path))
    replica = gone_on(backend, folder, sync, {"frozen": frozen}, {"frozen": not frozen})
    for step in range(4, 13):
        take_step(backend, replica, step, even=True)
    replica.settle()
    assert alike(backend, replica.module)


@pytest.mark.costly(2)
@pytest.mark.parametrize("sync", SYNCS)
@pytest.mark.parametrize("grouped", [True, False], ids=["one group", "none"])
def test_a_run_in_other_groups_goes_on_from_the_average(backend, tmp_path, sync, grouped):
    folder = backend.broadcast_object(str(tmp_path))
    groups = {"group": None}, {"group": backend.world_size}
    replica = gone_on(backend, folder, sync, *(groups if grouped else groups[::-1]))
    for step in range(4, 13):
        take_step(backend, replica, step, even=True)
        assert alike(backend, replica.module) or not grouped  # inside a group in every step
    replica.settle()
    assert alike(backend, replica.module)
