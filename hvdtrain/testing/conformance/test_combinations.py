"""Every two features together train as one process without them does (float64, 1e-12), or are refused by the table."""

import itertools

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.backends.exclusions import ASKED_BY, exclusion
from hvdtrain.backends.units import is_cut
from hvdtrain.data.arrays import ArrayDataset
from hvdtrain.errors import ConfigError
from hvdtrain.testing.cutting import offered

ASKED = {
    "static_graph": {"static_graph": True},
    "accumulate": {"accumulate": 2},
    "find_unused_parameters": {"find_unused_parameters": True},
    "checkpoint_modules": {"checkpoint_modules": "1"},
    "compile": {"compile": {"backend": "aot_eager"}},
    "shard_optimizer": {},
    "clip_norm": {"clip_norm": 0.05},
    "on_nan": {"on_nan": "skip"},
    "compression": {"compression": "topk:1"},
    "shard_modules": {"shard_modules": "1"},
    "bucket_bytes": {"bucket_bytes": 100},
}
ALONE = (
    "reduce_dtype",
    "channels_last",
    "master_weights",
    "scaler",
    "uncut_optimizer",
    "sync",
    "meeting_ranks",
    "wide_parameters",
)
"""What does not train in float64, or not this model, or not as one process: tests of their own try what excludes it."""
CHANGES_THE_RESULT = ("clip_norm",)
COMPILE = (
    pytest.mark.feature("compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch hides it by itself
)
PAIRS = [pytest.param(*pair, marks=COMPILE if "compile" in pair else ()) for pair in itertools.combinations(ASKED, 2)]


def trained(backend, *features):
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    model = nn.Sequential(nn.Linear(4, 5), inner, nn.Linear(5, 3)).double()
    x = torch.randn(12, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    if "shard_optimizer" in features:
        optimizer = hvdtrain.ShardedOptimizer(optimizer, backend)
    options = {name: value for feature in features for name, value in ASKED[feature].items()}
    trainer = hvdtrain.Trainer(backend, model, optimizer, loss=nn.functional.cross_entropy, precision="fp64", **options)
    trainer.fit(ArrayDataset(x, torch.arange(12) % 3), epochs=1, global_batch_size=4)
    whole = [p.full_tensor() if is_cut(p) else p for p in model.parameters()]
    return torch.cat([parameter.detach().flatten() for parameter in whole])


@pytest.fixture(scope="module")
def expected(backend):
    """What one process has with the features that change the result alone."""
    found = {}

    def of(reference, features):
        if features not in found:
            found[features] = trained(reference, *features)
        return found[features]

    return of


def test_every_feature_that_may_meet_another_is_tried():
    assert {*ASKED, *ALONE} == set(ASKED_BY)


@pytest.mark.costly(8)
@pytest.mark.feature("combinations")
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_features_together_change_nothing_or_are_refused(backend, reference, expected, first, second):
    if "compile" in (first, second):
        torch._dynamo.reset()
    refused = exclusion(first, second) or exclusion(first, backend.name) or exclusion(second, backend.name)
    if refused:
        with pytest.raises(ConfigError) as said:
            trained(backend, first, second)
        assert str(said.value) == refused.sentence
        return
    if "shard_modules" in (first, second) and not offered(backend, lambda: trained(backend, first, second)):
        return
    plain = expected(reference, tuple(name for name in (first, second) if name in CHANGES_THE_RESULT))
    assert float((trained(backend, first, second) - plain).abs().max()) < 1e-12


class NeverUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.never = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


@pytest.mark.feature("combinations")
@pytest.mark.parametrize(
    "options", [("static_graph",), ("find_unused_parameters",), ("static_graph", "find_unused_parameters")]
)
@pytest.mark.parametrize("some_rank_is_empty", [False, True])
def test_a_parameter_that_is_never_used_has_no_gradient_rather_than_zeros(
    backend, reference, options, some_rank_is_empty
):
    # Zeros would decay it.
    n = backend.world_size
    size = max(1, n - 1) if some_rank_is_empty else 2 * n
    ends = []
    for on in (backend, reference):
        torch.manual_seed(1)
        model = NeverUsed().double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        data = ArrayDataset(torch.randn(4 * size, 4, dtype=torch.float64), torch.arange(4 * size) % 3)
        trainer = hvdtrain.Trainer(
            on, model, optimizer, loss=nn.functional.cross_entropy, precision="fp64", **dict.fromkeys(options, True)
        )
        trainer.fit(data, global_batch_size=size)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert float((ends[0] - ends[1]).abs().max()) < 1e-12
