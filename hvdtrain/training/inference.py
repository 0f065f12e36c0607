"""How a model is used without being trained: in evaluation mode, without gradients, with rank 0's buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hvdtrain.backends.replica import Replica


@contextmanager
def inference(replica: Replica) -> Iterator[nn.Module]:
    """Give the model to call, which trains again afterwards if it did before; every rank must enter.

    Args:
        replica: Its buffers (running statistics and the like) become those of rank 0.
    """
    replica.sync_buffers()
    model = replica.inference_model
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(was_training)
