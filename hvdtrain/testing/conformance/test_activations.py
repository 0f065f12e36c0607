"""Activation checkpointing changes what is kept, and no number: gradients, dropout, running statistics, copies."""

import copy

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError
from hvdtrain.sync_batch_norm import convert_sync_batch_norm
from hvdtrain.training.activation_checkpointing import SELECTIVE_CONTEXTS, checkpoint_activations

pytestmark = pytest.mark.feature("activation checkpointing")


class Counting(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, x):
        self.calls += 1
        return self.module(x)


def block(norm):
    return nn.Sequential(nn.Linear(6, 6), norm(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 6))


def made(norm=nn.BatchNorm1d):
    torch.manual_seed(1)
    return nn.Sequential(block(norm), Counting(block(norm)), Counting(block(norm)), nn.Linear(6, 3)).double()


def data(n):
    torch.manual_seed(2)
    return ArrayDataset(torch.randn(n, 6, dtype=torch.float64), torch.arange(n) % 3)


def trained(backend, model, **options):
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = hvdtrain.Trainer(
        backend, model, optimizer, loss=nn.functional.cross_entropy, precision="fp64", accumulate=2, **options
    )
    n = 12 * backend.world_size
    return model, trainer.fit(data(n), data(7), epochs=3, global_batch_size=n // 2)


def difference(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.costly(1)
@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("synchronised", [False, True])
def test_training_is_the_same_with_and_without(backend, policy, synchronised):
    models = [made(), made()]
    if policy == "selective" and SELECTIVE_CONTEXTS is None:
        with pytest.raises(ConfigError, match=r"needs torch 2[.]5 or newer"):
            trained(backend, models[1], checkpoint_modules="1|2", checkpoint_policy=policy)
        return
    if synchronised:
        models = [convert_sync_batch_norm(model, backend) for model in models]
    plain, before = trained(backend, models[0])
    again, after = trained(backend, models[1], checkpoint_modules="1|2", checkpoint_policy=policy)
    assert difference(plain, again) < 1e-12
    assert before.eval_metrics["loss"] == pytest.approx(after.eval_metrics["loss"], rel=1e-12)
    assert list(plain.state_dict()) == list(again.state_dict())
    assert type(again[1]) is Counting
    assert again[1].calls > plain[1].calls  # it was computed again


def test_a_copy_computes_with_its_own_parameters(backend):
    model = made(nn.LayerNorm)
    assert checkpoint_activations(model, r"\d+\.module", policy="full") == ["1.module", "2.module"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    x = torch.ones(2, 6, dtype=torch.float64)
    model.eval()
    other.eval()
    assert not torch.equal(model(x), other(x))
    other(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.parameters())


def test_the_outermost_is_taken_and_only_once(backend):
    model = made()
    assert checkpoint_activations(model, "[12].*") == ["1", "2"]
    for again in ("1", "1.module"):
        with pytest.raises(ConfigError, match="already"):
            checkpoint_activations(model, again)


@pytest.mark.parametrize(
    ("pattern", "policy", "message"),
    [
        ("layer[34]", "full", "there are 0, 0.0"),
        ("[", "full", "no regular expression"),
        ("1", "half", "checkpoint_policy"),
    ],
)
def test_what_cannot_be_is_refused(backend, pattern, policy, message):
    with pytest.raises(ConfigError, match=message):
        trained(backend, made(), checkpoint_modules=pattern, checkpoint_policy=policy)


def test_a_module_that_changes_its_buffers_is_refused(backend):
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 3)).double()
    with pytest.raises(ConfigError, match="'0' changes its buffers"):
        trained(backend, model, checkpoint_modules="0")
