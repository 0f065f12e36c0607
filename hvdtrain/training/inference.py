"""How a model is used without being trained: in evaluation mode, without gradients, with rank 0's buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hvdtrain.backends.replica import Replica


@contextmanager
def inference(replica: Replica) -> Iterator[nn.Module]:
    """Give the model to call, whose modules are afterwards as they were, training or not; every rank must enter.

    Args:
        replica: Its buffers (running statistics and the like) become those of rank 0.
    """
    replica.sync_buffers()
    model = replica.inference_model
    with modes_kept(model), torch.no_grad():
        model.eval()
        yield model
        replica.end_inference()


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Let a model change between training and evaluation; afterwards each of its modules is as it was, frozen ones too."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        model.train(modes[model])
        for module, was_training in modes.items():
            module.training = was_training
