"""More than one of things in an own loop: models, optimizers, losses, backward passes; each equal to torch alone on all samples."""

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.feature("several")

SAMPLES = 11  # no number of ranks but 1 divides it


def made(inputs, outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def samples(step, size=3, shift=0):
    draw = torch.Generator().manual_seed(97 * step + shift)
    return torch.randn(SAMPLES, size, generator=draw, dtype=torch.float64)


class Alone:
    """What the loops below ask of a replica, by torch alone on the whole batch."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def backward(self, loss, *, samples, retain_graph=False):
        loss.backward(retain_graph=retain_graph)

    def reduce_gradients(self):
        pass

    def clear(self):
        self.model.zero_grad()

    def step(self, clip_norm=None):
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture
def both(backend):
    """Runs ``loop(replicate, mine)`` over the ranks and alone; the models that it returns must end alike."""

    def run(loop):
        spread = loop(backend.replicate, lambda x: x[backend.rank :: backend.world_size])
        alone = loop(Alone, lambda x: x)
        for one, other in zip(spread, alone, strict=True):
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                assert (a - b).detach().abs().max() < 1e-12

    return run


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def test_two_networks_against_each_other(both):
    def loop(replicate, mine):
        generator, critic = made(2, 3), made(3, 1, seed=1)
        generates = replicate(generator, torch.optim.Adam(generator.parameters(), lr=0.01))
        judges = replicate(critic, sgd(critic))
        for step in range(4):
            real, noise = mine(samples(step)), mine(samples(step, 2, shift=1))
            for _ in range(2):
                loss = (
                    nn.functional.softplus(-critic(real)).mean()
                    + nn.functional.softplus(critic(generator(noise).detach())).mean()
                )
                judges.backward(loss, samples=len(real))
                judges.step()
            critic.requires_grad_(False)
            generates.backward(nn.functional.softplus(-critic(generator(noise))).mean(), samples=len(noise))
            generates.step(clip_norm=0.05)
            critic.requires_grad_(True)
        return generator, critic

    both(loop)


@pytest.mark.filterwarnings(
    "ignore:Grad strides do not match"
)  # of DDP, which copies: a penalty's gradient is transposed
def test_a_gradient_penalty(both):
    def loop(replicate, mine):
        critic = made(3, 1)
        judges = replicate(critic, sgd(critic))
        for step in range(3):
            x = mine(samples(step)).requires_grad_()
            score = critic(x)
            (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
            judges.backward(score.mean() + 10 * (slope.norm(dim=1) - 1).square().mean(), samples=len(x))
            judges.step()
        return (critic,)

    both(loop)


def test_losses_that_use_parts_of_a_model_in_turn(both):
    def loop(replicate, mine):
        body, heads = made(3, 4), nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 2)]).double()
        whole = nn.ModuleList([body, heads])
        torch.manual_seed(5)
        for head in heads:
            nn.init.normal_(head.weight)
            nn.init.zeros_(head.bias)
        options = {} if replicate is Alone else {"find_unused_parameters": True}
        trains = replicate(whole, sgd(whole), **options)
        for step in range(4):
            x = mine(samples(step))
            trains.backward(heads[step % 2](body(x)).square().mean(), samples=len(x))
            trains.step()
        return (whole,)

    both(loop)


@pytest.mark.parametrize("infinite", ["", "0.weight", "2.weight"])
def test_one_loss_and_one_scaler_for_two_optimizers_that_are_stepped_by_hand(backend, infinite):
    def trained(replicate, mine):
        model = made(3, 2).float()
        optimizers = [sgd(model[0]), torch.optim.AdamW(model[2].parameters(), lr=0.01, fused=True)]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        trains, scales = replicate(model), []
        for step in range(5):
            x = mine(samples(step)).float()
            hook = None
            if infinite and step == 2:
                hook = model.get_parameter(infinite).register_hook(lambda grad: grad * torch.inf)
            trains.backward(scaler.scale(model(x).square().mean()), samples=len(x))
            trains.reduce_gradients()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model[0].parameters(), 0.05)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            if hook is not None:
                hook.remove()
            trains.clear()
            scales.append(scaler.get_scale())
        return model, scales

    spread, scales = trained(backend.replicate, lambda x: x[backend.rank :: backend.world_size])
    alone, expected = trained(lambda model: Alone(model, None), lambda x: x)
    assert scales == expected
    for a, b in zip(spread.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("second", ["nobody's", "by hand"])
def test_a_norm_is_the_same_with_and_without_a_scaler_where_the_optimizer_holds_some_parameters(backend, second):
    def stepped(scaler):
        model = made(3, 2).float()
        trains, other = backend.replicate(model, sgd(model[0])), sgd(model[2])
        found = []
        for step in range(3):
            x = samples(step)[backend.rank :: backend.world_size].float()
            loss = model(x).square().mean()
            trains.backward(loss if scaler is None else scaler.scale(loss), samples=len(x))
            trains.reduce_gradients()
            if second == "by hand":
                if scaler is None:
                    other.step()
                else:
                    scaler.step(other)
            found.append(trains.step(scaler=scaler, clip_norm=0.05).gradient_norm)
        return model, torch.stack(found)

    plain, norms = stepped(None)
    for scaler in (torch.amp.GradScaler("cpu", init_scale=1024.0), torch.amp.GradScaler("cpu", enabled=False)):
        scaled, same = stepped(scaler)
        torch.testing.assert_close(same, norms)
        for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_infinity_outside_the_optimizer_skips_its_step_too(backend):
    model = made(3, 2).float()
    trains = backend.replicate(model, sgd(model[0]))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = model[0].weight.detach().clone()
    hook = model[2].bias.register_hook(lambda grad: grad * torch.inf)
    x = samples(backend.rank).float()
    trains.backward(scaler.scale(model(x).square().mean()), samples=len(x))
    hook.remove()
    assert trains.step(scaler=scaler, clip_norm=1.0).skipped
    assert scaler.get_scale() == 512
    assert torch.equal(model[0].weight, before)


def test_gradients_clipped_by_value_and_by_group(both):
    def loop(replicate, mine):
        model = made(3, 2)
        optimizer = sgd(model)
        trains = replicate(model, optimizer)
        for step in range(4):
            x = mine(samples(step))
            trains.backward(model(x).square().sum(1).mean(), samples=len(x))
            trains.reduce_gradients()
            nn.utils.clip_grad_value_(model[0].parameters(), 0.01)
            nn.utils.clip_grad_norm_(model[2].parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return (model,)

    both(loop)
