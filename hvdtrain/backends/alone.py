"""The replica of a world of one: nothing is exchanged, and everything else is as on many ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.backends.replica import Replica
from hvdtrain.backends.unsent import Remembered, Unsent
from hvdtrain.backends.weighting import Tally
from hvdtrain.errors import ConfigError


class LocalReplica(Replica):
    """The only copy: nothing is exchanged."""

    _reuses_gradients = False

    def _set_up(self) -> None:
        self._split: nn.Module | None = None

    def split_over_gpus(self) -> None:
        """Let `model` split each batch over all visible GPUs.

        Raises:
            ConfigError: Copies of the model would compute with the first GPU's parameters.
        """
        replaced = next((name for name, part in self.module.named_modules() if "forward" in vars(part)), None)
        if replaced is not None:
            raise ConfigError(
                f"--data-parallel copies the model to each GPU, and the forward() of {repr(replaced) if replaced else 'the model'} has been replaced (as --compile and "
                "--checkpoint-modules do), which would compute with the first GPU's parameters; leave these out, or start one process "
                "a GPU: torchrun --nproc-per-node gpu -m hvdtrain ..."
            )
        self._split = _OverGpus(self.module)

    @property
    def model(self) -> nn.Module:
        """The user's own model; over all GPUs where it is split over them."""
        return self._split or self.module

    @property
    def inference_model(self) -> nn.Module:
        """The same as `model`."""
        return self.model

    def _send_during(self, loss: Tensor, weight: Tensor, tally: Tally, retain_graph: bool) -> None:
        loss.backward(weight, retain_graph=retain_graph)
        self.lap("backward")

    def _send_after(self, tally: Tally, empty: bool) -> None:
        pass

    def _finish(self, empty: bool) -> Tensor:
        if self._unsent is not None and self._unsent.any_rest:
            self._add_rests(self._unsent)
        return torch.tensor(self._weighting.tally.values(), dtype=torch.float64)

    @torch.no_grad()
    def _add_rests(self, unsent: Unsent) -> None:
        """Use what a run of several ranks had not sent when its checkpoint was written."""
        to_mean = self._unit_of(self._weighting.tally)
        for parameter in self._parameters:
            remembered = unsent.of(parameter)
            if to_mean is not None and remembered.rest is not None and parameter.grad is not None:
                parameter.grad.add_(remembered.rest / to_mean)
                unsent.note(parameter, Remembered(None, remembered.memory))


class _OverGpus(nn.DataParallel[nn.Module]):
    """`nn.DataParallel` with the attributes and the state of the model inside; its methods run on one GPU."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of the model inside."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of the model inside."""
        return self.module.load_state_dict(*args, **kwargs)
