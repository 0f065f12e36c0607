import copy

import pytest
import torch
from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.optim.pieces import Piece, cut_out, joined
from hvdtrain.optim.sharded import ELEMENTWISE, ShardedOptimizer
from hvdtrain.testing.threads import run_ranks


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last))
    model.register_parameter("scalar", nn.Parameter(torch.tensor(2.0)))
    model.register_parameter("unused", nn.Parameter(torch.ones(4)))
    model.register_parameter("none", nn.Parameter(torch.ones(0, 3)))
    model.register_parameter("low", nn.Parameter(torch.ones(9, dtype=torch.bfloat16)))
    return model


MODEL = made()  # ranks are threads here, and share the random numbers: they copy it
NO_BFLOAT16 = made()  # what is loaded into a plain optimizer is rounded to the parameter's type, counters too
del NO_BFLOAT16.low


def optimizer_of(name, model):
    parameters = list(model.parameters())
    options = {} if name == "Rprop" else {"weight_decay": 0.01}
    if name == "SGD":
        options["momentum"] = 0.9
    groups = [{"params": parameters[:2], "lr": 0.05}, {"params": parameters[2:]}]
    return getattr(torch.optim, name)(groups, lr=0.1, **options)


def differentiate(model, step):
    draw = torch.Generator().manual_seed(step)
    for name, parameter in model.named_parameters():
        parameter.grad = None if name == "unused" else torch.randn(parameter.shape, generator=draw).to(parameter.dtype)


def plainly(name, steps, model=MODEL):
    model = copy.deepcopy(model)
    optimizer = optimizer_of(name, model)
    for step in steps:
        differentiate(model, step)
        optimizer.step()
    return model, optimizer


def assert_same_state(one, other):
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for index, state in one["state"].items():
        assert state.keys() == other["state"][index].keys()
        for name, value in state.items():
            theirs = other["state"][index][name]
            assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs, (index, name)


def held(optimizer):
    return sum(
        value.numel() for state in optimizer._inner.state.values() for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_it_computes_what_the_plain_optimizer_does_bit_for_bit(name, ranks):
    plain, expected = plainly(name, range(4))

    def rank(communicator):
        model = copy.deepcopy(MODEL)
        optimizer = ShardedOptimizer(optimizer_of(name, model), communicator)
        for step in range(4):
            differentiate(model, step)
            optimizer.step()
        return model, optimizer.state_dict(), held(optimizer)

    found = run_ranks(ranks, rank)
    for model, state, _ in found:
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)
        assert_same_state(state, expected.state_dict())
    whole = sum(one[2] for one in found)
    buckets = 3  # of two groups and two types
    assert max(one[2] for one in found) <= whole / ranks + 3 * buckets


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "ASGD"])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (0, 2), (2, 0), (1, 2)])
def test_its_state_goes_on_at_any_number_of_ranks_and_unsharded(name, before, after):
    """0 ranks: the plain optimizer."""

    def steps(ranks, which, state):
        def rank(communicator):
            model = copy.deepcopy(NO_BFLOAT16 if state is None else state[0])
            optimizer = optimizer_of(name, model)
            if ranks:
                optimizer = ShardedOptimizer(optimizer, communicator)
            if state is not None:
                optimizer.load_state_dict(copy.deepcopy(state[1]))
            for step in which:
                differentiate(model, step)
                optimizer.step()
            return model, optimizer.state_dict()

        return run_ranks(max(1, ranks), rank)[-1]

    model, state = steps(after, range(2, 4), steps(before, range(2), None))
    plain, expected = plainly(name, range(4), NO_BFLOAT16)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    assert_same_state(state, expected.state_dict())


def test_settings_and_groups_may_change():
    def steps(model, optimizer):
        for step in range(4):
            if step == 2:
                optimizer.param_groups[0]["lr"] = 0.5
                late = nn.Parameter(torch.ones(4, 2))
                model.register_parameter("late", late)
                optimizer.add_param_group({"params": [late], "lr": 0.01})
            differentiate(model, step)
            optimizer.step()
        return model

    def rank(communicator):
        model = copy.deepcopy(MODEL)
        return steps(model, ShardedOptimizer(optimizer_of("AdamW", model), communicator))

    plain = copy.deepcopy(MODEL)
    steps(plain, optimizer_of("AdamW", plain))
    for model in run_ranks(3, rank):
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)


def test_an_optimizer_that_looks_at_whole_parameters_is_refused():
    model = nn.Linear(3, 3)

    class Own(torch.optim.SGD):
        pass

    def rank(communicator):
        for optimizer in (torch.optim.Adafactor(model.parameters()), Own(model.parameters())):
            with pytest.raises(ConfigError, match="elementwise=True"):
                ShardedOptimizer(optimizer, communicator)
        ShardedOptimizer(Own(model.parameters()), communicator, elementwise=True)

    run_ranks(1, rank)


def test_a_parameter_that_is_not_in_one_piece_of_memory_is_refused():
    parameter = nn.Parameter(torch.ones(4, 4)[:, ::2])
    with pytest.raises(ConfigError, match="one piece of memory"):
        run_ranks(1, lambda communicator: ShardedOptimizer(torch.optim.Adam([parameter]), communicator))


def sharded_steps(edit, name="AdamW", ranks=2, steps=4):
    """Train, with ``edit(model, optimizer)`` before the third step, on each rank."""

    def rank(communicator):
        model = copy.deepcopy(MODEL)
        optimizer = ShardedOptimizer(optimizer_of(name, model), communicator)
        for step in range(steps):
            if step == 2:
                edit(model, optimizer)
            differentiate(model, step)
            optimizer.step()
        return model

    return run_ranks(ranks, rank)


def take_out(model, optimizer):
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]


def resize(model, optimizer):
    model[0].weight.data = torch.ones(6, 7)


def lay_otherwise(model, optimizer):
    model[2].to(memory_format=torch.contiguous_format)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (take_out, "taken out of a ShardedOptimizer's param_groups"),
        (lambda model, optimizer: optimizer.param_groups.pop(), "taken out of a ShardedOptimizer's param_groups"),
        (resize, r"shape \(6, 7\) and strides \(7, 1\), and its 35 numbers lay otherwise"),
        (lay_otherwise, "change its memory format before the first step"),
        (lambda model, optimizer: optimizer.state[model[0].weight], r"whole by state_dict\(\)"),
        (lambda model, optimizer: optimizer.state.update({}) or copy.deepcopy(optimizer), "neither copied nor pickled"),
        (lambda model, optimizer: setattr(optimizer, "state", {model[0].weight: {}}), r"changes it by load_state_dict"),
    ],
    ids=["taken out", "group popped", "resized", "memory format", "state", "copied", "state given"],
)
def test_what_would_not_be_what_was_cut_is_refused_by_a_sentence(edit, message):
    with pytest.raises(ConfigError, match=message):
        sharded_steps(edit)


def test_a_parameter_that_is_resized_before_the_first_step_is_refused():
    def rank(communicator):
        model = copy.deepcopy(MODEL)
        optimizer = ShardedOptimizer(optimizer_of("SGD", model), communicator)
        resize(model, optimizer)
        differentiate(model, 0)
        with pytest.raises(ConfigError, match="resize it before the ShardedOptimizer is made"):
            optimizer.step()

    run_ranks(2, rank)


def test_a_sparse_gradient_is_refused_on_every_rank():
    def rank(communicator):
        table, other = nn.Embedding(4, 3, sparse=True), nn.Parameter(torch.ones(90))
        optimizer = ShardedOptimizer(torch.optim.SGD([other, table.weight], lr=0.1), communicator)
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(ConfigError, match="a gradient is sparse"):
            optimizer.step()

    run_ranks(2, rank)


@pytest.mark.parametrize("forget", [lambda o: o.state.clear(), lambda o: setattr(o, "state", {})], ids=["clear", "set"])
def test_the_state_can_be_forgotten_as_the_plain_ones(forget):
    plain = copy.deepcopy(MODEL)
    optimizer = optimizer_of("AdamW", plain)
    for step in range(4):
        if step == 2:
            optimizer.state.clear()
        differentiate(plain, step)
        optimizer.step()
    for model in sharded_steps(lambda model, optimizer: forget(optimizer)):
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_schedule_that_holds_the_groups_still_holds_them_after_a_load():
    def rank(communicator):
        optimizer = ShardedOptimizer(optimizer_of("SGD", copy.deepcopy(MODEL)), communicator)
        held = list(optimizer.param_groups)
        state = optimizer.state_dict()
        state["param_groups"][0]["lr"] = 0.25
        optimizer.load_state_dict(state)
        assert all(a is b for a, b in zip(optimizer.param_groups, held, strict=True))
        assert held[0]["lr"] == 0.25

    run_ranks(2, rank)


def test_a_loaded_counter_goes_to_the_device_only_where_the_optimizer_wants_it_there():
    parameter = nn.Parameter(torch.ones(4, device="meta"))
    piece = Piece(parameter, slice(0, 2), nn.Parameter(parameter.detach()[:2]))
    step = torch.tensor(3.0)
    assert cut_out("step", step, piece, counters_too=True).device.type == "meta"
    assert cut_out("step", step, piece, counters_too=False).device.type == "cpu"


def test_a_whole_state_is_put_together_on_the_cpu():
    parameter = nn.Parameter(torch.ones(4, device="meta"))
    whole = joined(parameter, [(slice(0, 3), torch.ones(3)), (slice(3, 4), torch.zeros(1))])
    assert whole.tolist() == [1, 1, 1, 0]
