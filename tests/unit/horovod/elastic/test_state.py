"""What is committed is kept by value, and what an interrupt does to a training function."""

import pytest
import torch

import hvdtrain.horovod as hvd

pytestmark = pytest.mark.usefixtures("one_rank")


def trained():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def test_restore_undoes_everything_since_the_commit_also_inside_containers():
    model, optimizer = trained()
    state = hvd.elastic.TorchState(model, optimizer, batch=3, seen={"ids": [1]})
    step(model, optimizer)
    state.batch, state.seen["ids"] = 4, [1, 2]
    state.commit()
    kept, momentum = weights(model), optimizer.state[model.weight]["momentum_buffer"].clone()
    for _ in range(2):  # a second restore is as good as the first
        step(model, optimizer)
        state.batch = 9
        state.seen["ids"].append(3)
        state.restore()
        assert (state.batch, state.seen) == (4, {"ids": [1, 2]})
        assert all(map(torch.equal, weights(model), kept))
        assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], momentum)


def test_a_model_that_is_put_in_anothers_place_is_the_one_that_is_kept():
    model, optimizer = trained()
    state = hvd.elastic.TorchState(model, optimizer)
    other = torch.nn.Linear(2, 1)
    state.model = other
    kept = weights(other)
    other.weight.data.zero_()
    state.restore()
    assert all(map(torch.equal, weights(other), kept))


def test_sync_is_a_commit():
    state = hvd.elastic.TorchState(epoch=1)
    state.epoch = 5
    state.sync()
    state.epoch = 6
    state.restore()
    assert state.epoch == 5


def test_an_object_state_needs_nothing_of_torch():
    state = hvd.elastic.ObjectState(lambda value: value, lambda: 0, step=1)
    state.step = 2
    state.commit()
    state.step = 3
    state.restore()
    assert state.step == 2


def test_other_hosts_let_the_function_begin_again_after_the_callbacks():
    state = hvd.elastic.TorchState(step=0)
    told, begun = [], []
    state.register_reset_callbacks([lambda: told.append(state.step)])

    @hvd.elastic.run
    def train(state, word):
        begun.append(state.step)
        while state.step < 4:
            state.step += 1
            if state.step == 2:
                state.on_hosts_updated(1.0, 2)
            state.commit()
        return word

    assert (train(state, "done"), told, begun) == ("done", [2], [0, 2])


def test_a_failed_operation_restores_and_ends_with_one_sentence():
    state = hvd.elastic.TorchState(step=0)

    @hvd.elastic.run
    def train(state):
        state.step = 1
        state.commit()
        state.step = 2
        raise hvd.HorovodInternalError("allreduce 'x' failed")

    with pytest.raises(hvd.HorovodInternalError, match=r"^allreduce 'x' failed\. The state is back .* not offered yet"):
        train(state)
    assert state.step == 1


def test_other_errors_pass_through():
    @hvd.elastic.run
    def train(state):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(hvd.elastic.TorchState(step=0))
