"""A model that was looked at trains on as it was."""

import pytest
import torch
from torch import nn

from hvdtrain.training.inference import inference


@pytest.mark.parametrize("whole", [True, False])
def test_each_module_is_afterwards_as_it_was_and_every_one_evaluates_meanwhile(alone, whole):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout())
    model.train(whole)
    model[1].train(not whole)  # a frozen one, or the only one that trains
    before = [module.training for module in model.modules()]
    replica = alone.replicate(model, torch.optim.SGD(model.parameters()))
    with inference(replica) as used:
        assert not any(module.training for module in used.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
