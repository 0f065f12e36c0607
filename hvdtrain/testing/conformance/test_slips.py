"""What users do in a loop of their own: right on every engine, or refused by a sentence, before the ranks drift apart."""

import copy
import math

import pytest
import torch
from torch import nn

from hvdtrain.errors import ConfigError, TrainingError

# torch 2.4 to 2.5, of their own checkpointing
pytestmark = [
    pytest.mark.feature("slips"),
    pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning"),
]
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def samples(count, start=0):
    return torch.sin(torch.arange(start * 4, (start + count) * 4, dtype=torch.float64)).reshape(count, 4)


def made(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def replicate(backend, model, **options):
    return backend.replicate(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def loss_of(model, backend, count=2):
    return model(samples(count, count * backend.rank)).square().mean()


@pytest.mark.parametrize("end", ["step", "reduce_gradients", "backward"])
def test_a_plain_backward_pass_is_refused(backend, end):
    model = made()
    replica = replicate(backend, model)
    before = copy.deepcopy(model.state_dict())
    loss_of(replica.model, backend).backward()
    arguments = {"loss": loss_of(replica.model, backend), "samples": 2} if end == "backward" else {}
    with pytest.raises(TrainingError, match=r"holds a gradient that no replica\.backward\(\)"):
        getattr(replica, end)(**arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    replica.clear()
    replica.backward(loss_of(replica.model, backend), samples=2)
    replica.step()
    states = backend.all_gather_object([p.tolist() for p in model.parameters()])
    assert all(state == states[0] for state in states)


PLAIN_AFTER = {
    "one more": lambda replica, backend: loss_of(replica.model, backend).backward(),
    "through a part": lambda replica, backend: (
        replica.model[2](samples(2, backend.rank)[:, :1].expand(2, 5)).sum().backward()
    ),
    "instead": lambda replica, backend: (replica.model.zero_grad(), loss_of(replica.model, backend).backward()),
    "after clipping": lambda replica, backend: (
        nn.utils.clip_grad_norm_(replica.model.parameters(), 0.1),
        loss_of(replica.model, backend).backward(),
    ),
}
ENDS = {
    "step": lambda replica: replica.step(),
    "the optimizer's own": lambda replica: replica.optimizer.step(),
    "a scaler's": lambda replica: replica.step(scaler=torch.amp.GradScaler("cpu", init_scale=1.0)),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("plain", PLAIN_AFTER)
def test_a_plain_backward_pass_after_the_exchange_is_refused(backend, plain, end):
    model = made() if end != "a scaler's" else made().float()
    dtype = next(model.parameters()).dtype
    model.register_forward_pre_hook(lambda module, args: args[0].to(dtype))
    model[2].register_forward_pre_hook(lambda module, args: args[0].to(dtype))
    replica = replicate(backend, model)
    for step in range(2):  # the first step, and one in which everything is in place
        replica.backward(loss_of(replica.model, backend), samples=2)
        replica.reduce_gradients()
        before = copy.deepcopy(model.state_dict())
        PLAIN_AFTER[plain](replica, backend)
        with pytest.raises(TrainingError, match=r"after the exchange.*replica\.clear\(\)"):
            ENDS[end](replica)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), step
        replica.clear()
        replica.backward(loss_of(replica.model, backend), samples=2)
        replica.reduce_gradients()
        x = torch.ones(1, 4, dtype=dtype, requires_grad=True)
        torch.autograd.grad(replica.model(x).sum(), x)  # touches no gradient of the model's
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
        replica.step()
    states = backend.all_gather_object([p.tolist() for p in model.parameters()])
    assert all(state == states[0] for state in states)


def test_a_plain_backward_pass_after_the_exchange_is_refused_without_an_optimizer(backend):
    replica = backend.replicate(made(), None)
    for _ in range(2):
        replica.backward(loss_of(replica.model, backend), samples=2)
        replica.reduce_gradients()
        loss_of(replica.model, backend).backward()
        with pytest.raises(TrainingError, match="after the exchange"):
            replica.clear()
        replica.clear()


def test_a_hook_of_the_users_is_found_beside_the_replicas_own(backend):
    model = made()
    replica = replicate(backend, model)
    replica.backward(loss_of(replica.model, backend), samples=2)
    replica.reduce_gradients()
    replica.step()
    model.append(nn.Linear(2, 2).double())
    replica.optimizer.add_param_group({"params": model[3].parameters()})
    replica.copy_from_rank_zero()
    for parameter in (model[0].weight, model[3].weight):
        handle = parameter.register_post_accumulate_grad_hook(lambda parameter: None)
        with pytest.raises(TrainingError, match="register_post_accumulate_grad_hook of yours"):
            replica.backward(loss_of(replica.model, backend), samples=2)
        handle.remove()
        replica.clear()
    replica.backward(loss_of(replica.model, backend), samples=2)
    replica.step()


CLEARS = {
    "zero_grad before": lambda replica, optimizer: optimizer.zero_grad(),
    "zero_grad to zeros": lambda replica, optimizer: optimizer.zero_grad(set_to_none=False),
    "the model's zero_grad": lambda replica, optimizer: replica.model.zero_grad(),
    "clear": lambda replica, optimizer: replica.clear(),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("clear", CLEARS)
def test_the_users_own_step_after_reduce_gradients(backend, clear, when):
    n = backend.world_size
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alone = copy.deepcopy(model)
    alone_optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    replica = backend.replicate(model, optimizer)
    for _ in range(3):
        alone_optimizer.zero_grad()
        for rank in range(n):
            (alone(samples(2, 2 * rank)).square().mean() / n).backward()
        nn.utils.clip_grad_value_(alone.parameters(), 0.01)
        alone_optimizer.step()
        if when == "before":
            CLEARS[clear](replica, optimizer)
        replica.backward(loss_of(replica.model, backend), samples=2)
        replica.reduce_gradients()
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
        if when == "after":
            CLEARS[clear](replica, optimizer)
    for p, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, wanted, **CLOSE)


def test_gradients_that_were_not_cleared_are_refused(backend):
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replica = backend.replicate(model, optimizer)
    replica.backward(loss_of(replica.model, backend), samples=2)
    replica.reduce_gradients()
    optimizer.step()
    with pytest.raises(TrainingError, match=r"were there before|not cleared"):
        optimizer.step()
    with pytest.raises(TrainingError, match="not cleared"):
        replica.backward(loss_of(replica.model, backend), samples=2)
    optimizer.zero_grad()
    loss_of(replica.model, backend).backward()  # the slip of a port, after a step that was right
    with pytest.raises(TrainingError, match="not exchanged"):
        optimizer.step()


def test_a_scaler_of_the_users_own_may_skip_a_step(backend):
    n = backend.world_size
    model = made().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replica = backend.replicate(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(model.state_dict())
    for step in range(3):
        loss = replica.model(torch.ones(2, 4)).square().mean()
        bad = step == 0 and backend.rank == n - 1
        replica.backward(scaler.scale(loss * math.inf if bad else loss), samples=2)
        replica.reduce_gradients()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert moved == (step > 0)
    assert scaler.get_scale() == 512.0
    states = backend.all_gather_object([p.tolist() for p in model.parameters()])
    assert all(state == states[0] for state in states)


def test_a_loss_without_a_graph_is_said_as_what_it_is(backend):
    model = made()
    replica = replicate(backend, model)
    with torch.no_grad():
        loss = loss_of(replica.model, backend)
    with pytest.raises(TrainingError, match="depends on no parameter that requires grad"):
        replica.backward(loss, samples=2)
    with pytest.raises(TrainingError, match=r"must be a scalar.*\(2, 2\)"):
        replica.backward(replica.model(samples(2)), samples=2)
    for wrong in ({"samples": -1}, {"samples": 1, "total": 0}):
        with pytest.raises(TrainingError, match="must be"):
            replica.backward(loss_of(replica.model, backend), **wrong)


def test_totals_on_some_ranks_only_are_refused_on_all(backend):
    if backend.world_size == 1:
        return  # nobody to differ from
    replica = replicate(backend, made())
    total = 2 * backend.world_size if backend.rank == 0 else None
    replica.backward(loss_of(replica.model, backend), samples=2, total=total)
    with pytest.raises(TrainingError, match="some ranks gave total="):
        replica.step()


def test_totals_in_some_calls_only_are_refused(backend):
    replica = replicate(backend, made())
    with replica.accumulate(last=False):
        replica.backward(loss_of(replica.model, backend), samples=2, total=4)
    with pytest.raises(TrainingError, match=r"give total= to every backward\(\) of a step, or to none"):
        replica.backward(loss_of(replica.model, backend), samples=2)


@pytest.mark.parametrize("how", ["total", "counted", "counted, unequal", "find-unused"])
def test_ranks_without_samples_only_step(backend, how):
    n = backend.world_size
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    alone = copy.deepcopy(model)
    alone_optimizer = torch.optim.AdamW(alone.parameters(), lr=0.1, weight_decay=0.5)
    replica = backend.replicate(model, optimizer, find_unused_parameters=how == "find-unused")
    for step in range(2 * n + 1):
        # In each step other ranks have samples; in the last nobody has.
        counts = [0 if step == 2 * n or (rank + step) % n >= n - step % n else 2 + step for rank in range(n)]
        if how == "counted, unequal":
            counts = [count * (rank + 1) for rank, count in enumerate(counts)]
        count, total = counts[backend.rank], sum(counts)
        if count:
            x = samples(count, sum(counts[: backend.rank]))
            known = None if how.startswith("counted") else total
            replica.backward(replica.model(x).square().mean(), samples=count, total=known)
        replica.step()
        alone_optimizer.zero_grad()
        if total:
            alone(samples(total)).square().mean().backward()
        alone_optimizer.step()
        for p, wanted in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, wanted, rtol=1e-10, atol=1e-12)  # Adam divides small numbers by small ones


@pytest.mark.parametrize("infinite", ["first", "second", "both", "neither"])
def test_one_scaler_serves_two_replicas(backend, infinite):
    n = backend.world_size
    one, two = made(1).float(), made(2).float()
    copies = [copy.deepcopy(one), copy.deepcopy(two)]
    replicas = [replicate(backend, one), replicate(backend, two)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    alone_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in copies]
    for step in range(5):
        bad = [step == 1 and infinite in ("first", "both"), step == 1 and infinite in ("second", "both")]
        silent = step == 3 and n > 1 and backend.rank == n - 1  # and has no samples
        for replica, inf in zip(replicas, bad, strict=True):
            loss = replica.model(torch.ones(2, 4)).square().mean()
            if not silent:
                replica.backward(scaler.scale(loss * math.inf if inf else loss), samples=2)
        skipped = [replica.step(scaler=scaler).skipped for replica in replicas]
        assert skipped == bad
        for model, optimizer, inf in zip(copies, optimizers, bad, strict=True):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().mean()
            alone_scaler.scale(loss * math.inf if inf else loss).backward()
        for optimizer in optimizers:
            alone_scaler.step(optimizer)
        alone_scaler.update()
        assert scaler.get_scale() == alone_scaler.get_scale()
        for model, wanted in zip((one, two), copies, strict=True):
            for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_scalers_update_can_stay_the_callers(backend):
    model = made().float()
    replica = replicate(backend, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    replica.backward(scaler.scale(loss_of(lambda x: replica.model(x.float()), backend)), samples=2)
    assert not replica.step(scaler=scaler, update=False).skipped
    assert scaler.get_scale() == 8.0
    scaler.update()
    assert scaler.get_scale() == 16.0


@pytest.mark.parametrize("tokens", [1, 64, 64 * 2048])
def test_a_count_of_samples_does_not_overflow_half_precision(backend, tokens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    replica = replicate(backend, model)
    scaler = torch.amp.GradScaler("cpu")
    x, y = torch.randn(64, 16), torch.randint(0, 3, (64,))
    for step in range(4):
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(replica.model(x), y)
        count = tokens * (backend.rank + 1) * (step + 1)
        with replica.accumulate(last=False):
            replica.backward(scaler.scale(loss), samples=count, retain_graph=True)
        replica.backward(scaler.scale(loss), samples=count)
        assert not replica.step(scaler=scaler).skipped


def plain(model, replica):
    model(samples(2)).square().mean().backward()


def by_hand(model, replica):
    model[0].weight.grad.mul_(2)


def replaced(model, replica):
    model[0].weight.grad = model[0].weight.grad * 2


def cleared(model, replica):
    replica.optimizer.zero_grad()


@pytest.mark.parametrize("last", [True, False], ids=["last", "earlier"])
@pytest.mark.parametrize("touch", [plain, by_hand, replaced, cleared])
def test_gradients_that_others_touch_before_they_are_exchanged_are_refused(backend, touch, last):
    model = made()
    replica = replicate(backend, model)
    with replica.accumulate(last=last):
        replica.backward(loss_of(replica.model, backend), samples=2)
    touch(model, replica)
    with pytest.raises(TrainingError, match="was changed after"):
        replica.step()


def test_another_replicas_loss_may_not_reach_gradients_that_were_exchanged(backend):
    one, two = made(1), made(2)
    first, second = replicate(backend, one), backend.replicate(two, torch.optim.SGD(two.parameters(), lr=0.1))
    first.backward(loss_of(one, backend), samples=2)
    first.reduce_gradients()
    x = samples(2, 2 * backend.rank)
    through = one(torch.cat([two(x), two(x)], 1)).square().mean()
    with pytest.raises(TrainingError, match="gradients of another replica that had been exchanged"):
        second.backward(through, samples=2)


@pytest.mark.parametrize("kind", ["logging", "optimizer"])
def test_hooks_that_run_while_gradients_leave_are_refused(backend, kind):
    model = made()
    replica = replicate(backend, model)
    seen = []
    hook = seen.append if kind == "logging" else (lambda p: p.data.sub_(p.grad))
    handle = model[0].weight.register_post_accumulate_grad_hook(hook)
    with pytest.raises(TrainingError, match=r"'0\.weight' has a register_post_accumulate_grad_hook"):
        replica.backward(loss_of(replica.model, backend), samples=2)
    handle.remove()
    replica.backward(loss_of(replica.model, backend), samples=2)
    replica.step()


@pytest.mark.parametrize("total", [True, False], ids=["total", "counted"])
def test_a_step_that_all_ranks_give_up_leaves_nothing_behind(backend, total):
    n = backend.world_size
    model = made()
    alone = copy.deepcopy(model)
    replica = replicate(backend, model)
    known = 2 * n if total else None
    for _ in range(2):
        replica.backward(loss_of(replica.model, backend) * 100, samples=2, total=known)
        replica.clear()
        with replica.accumulate(last=False):
            replica.backward(loss_of(replica.model, backend) * 100, samples=2, total=known)
        replica.clear()
        replica.backward(loss_of(replica.model, backend), samples=2, total=known)
        replica.step()
        alone.zero_grad()
        for rank in range(n):
            (alone(samples(2, 2 * rank)).square().mean() / n).backward()
        with torch.no_grad():
            for p in alone.parameters():
                p.sub_(0.1 * p.grad)
    for p, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, wanted, **CLOSE)


def test_a_step_that_one_rank_gives_up_is_noticed_at_the_next(backend):
    n = backend.world_size
    replica = replicate(backend, made())
    replica.backward(loss_of(replica.model, backend), samples=2)
    if backend.rank == n - 1:
        replica.clear()
    else:
        replica.step()
    replica.backward(loss_of(replica.model, backend), samples=2)
    if n == 1:
        replica.step()
        return
    with pytest.raises(TrainingError, match="different numbers of optimizer steps"):
        replica.step()


def test_replicas_whose_gradients_cross_are_noticed(backend):
    replicas = [replicate(backend, made(seed)) for seed in (1, 2)]
    mine = replicas if backend.rank % 2 == 0 else replicas[::-1]
    for replica in mine:
        replica.backward(loss_of(replica.model, backend), samples=2)
    if backend.world_size == 1 or backend.name == "horovod":  # which matches by name
        for replica in replicas:
            replica.step()
        return
    for replica in mine:
        with pytest.raises(TrainingError, match="gradients of different replicas"):
            replica.step()


def test_an_exception_in_the_exchange_cannot_be_passed_over(backend):
    model = made()
    replica = replicate(backend, model)
    handle = model[0].weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replica.backward(loss_of(replica.model, backend), samples=2)
    handle.remove()
    if backend.world_size == 1:
        replica.clear()
        replica.backward(loss_of(replica.model, backend), samples=2)
        replica.step()
        return
    for call in (replica.clear, replica.step):
        with pytest.raises(TrainingError, match="continue from a checkpoint"):
            call()


def test_gradients_that_are_kept_are_spoken_of(backend, logged):
    model = made()
    replica = replicate(backend, model)
    kept = []
    for _ in range(3):
        replica.backward(loss_of(replica.model, backend), samples=2)
        replica.reduce_gradients()
        kept = [p.grad for p in model.parameters()]
        replica.optimizer.step()
        replica.optimizer.zero_grad()
    said = [message for message in logged if "still referenced" in message]
    assert len(said) == (backend.world_size > 1)
    del kept


def test_what_users_hold_of_an_optimizer_stays_theirs(backend):
    model = made(backend.rank)
    optimizer = torch.optim.NAdam(model.parameters(), lr=torch.tensor(0.1 * (backend.rank + 1)))
    group, rate = optimizer.param_groups[0], optimizer.param_groups[0]["lr"]
    for _ in range(backend.rank % 2 + 1):
        model(samples(1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    backend.replicate(model, optimizer)
    assert optimizer.param_groups[0] is group
    assert optimizer.param_groups[0]["lr"] is rate
    states = backend.all_gather_object(
        [{k: (v.dtype, v.tolist()) for k, v in s.items()} for s in optimizer.state.values()]
    )
    assert all(state == states[0] for state in states)
    assert float(rate) == pytest.approx(0.1)


@pytest.mark.parametrize("where", ["first", "all"])
def test_a_scaler_meets_ranks_without_samples(backend, where):
    n = backend.world_size
    model = made().float()
    replica = replicate(backend, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(2):
        silent = where == "all" or (step == 0 and backend.rank == n - 1 and n > 1)
        if not silent:
            replica.backward(scaler.scale(replica.model(torch.ones(2, 4)).square().mean()), samples=2)
        assert not replica.step(scaler=scaler).skipped
    states = backend.all_gather_object([p.tolist() for p in model.parameters()])
    assert all(state == states[0] for state in states)


def test_samples_are_whole_numbers_and_none_adds_nothing(backend):
    model = made()
    replica = replicate(backend, model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match="whole number"):
        replica.backward(loss_of(replica.model, backend), samples=1.5)
    replica.clear()
    replica.backward(replica.model(samples(2)).sum() * math.nan, samples=0)
    replica.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_step_under_no_grad(backend):
    replica = replicate(backend, made())
    if backend.rank == 0:
        replica.backward(loss_of(replica.model, backend), samples=2)
    with torch.no_grad():
        replica.step()


class Wrapper:
    """Looks like an optimizer, and is none of torch's."""

    def __init__(self, inner):
        self.inner = inner
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self, closure=None):
        return self.inner.step()

    def zero_grad(self):
        self.inner.zero_grad()

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


class Subclass(torch.optim.Optimizer):
    """A subclass that never calls the constructor of its base."""

    def __init__(self, inner):
        self.inner = inner
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

    def step(self, closure=None):
        return self.inner.step()

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


@pytest.mark.parametrize("kind", [Wrapper, Subclass])
def test_a_wrapped_optimizer_steps_and_is_guarded(backend, kind):
    n = backend.world_size
    model = made()
    alone = copy.deepcopy(model)
    wrapped = kind(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    alone_optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    replica = backend.replicate(model, wrapped)
    for _ in range(2):
        replica.backward(loss_of(replica.model, backend), samples=2)
        replica.step()
        alone_optimizer.zero_grad()
        for rank in range(n):
            (alone(samples(2, 2 * rank)).square().mean() / n).backward()
        alone_optimizer.step()
    for p, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, wanted, **CLOSE)
    loss_of(replica.model, backend).backward()
    with pytest.raises(TrainingError, match="not exchanged"):
        wrapped.step()


def test_what_is_no_optimizer_is_refused(backend):
    with pytest.raises(ConfigError, match="cannot be used as an optimizer: it has no param_groups"):
        backend.replicate(made(), object())


def test_reentrant_checkpointing_is_right_or_explained(backend):
    n = backend.world_size
    model = made()
    replica = replicate(backend, model)
    x = samples(2, 2 * backend.rank).requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).square().mean()
    replica.backward(loss, samples=2)
    replica.reduce_gradients()
    alone = copy.deepcopy(made())
    for rank in range(n):
        (alone(samples(2, 2 * rank)).square().mean() / n).backward()
    for p, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, wanted.grad, **CLOSE)


def test_a_layer_that_reentrant_checkpointing_runs_twice_is_named(backend):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    replica = replicate(backend, model)
    x = samples(2, 2 * backend.rank).requires_grad_()
    first = torch.utils.checkpoint.checkpoint(model[0], x, use_reentrant=True)
    second = torch.utils.checkpoint.checkpoint(model[0], first, use_reentrant=True)
    loss = model[1](second).square().mean()
    if backend.world_size == 1:
        replica.backward(loss, samples=2)
        replica.step()
        return
    with pytest.raises(TrainingError, match="use_reentrant=False"):
        replica.backward(loss, samples=2)
