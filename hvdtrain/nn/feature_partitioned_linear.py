"""A linear layer whose input features are spread over the ranks, for more of them than one process should hold."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hvdtrain.backends.communicator import Communicator
from hvdtrain.data.partition import share
from hvdtrain.errors import ConfigError, TrainingError
from hvdtrain.nn.partitioned import summed, taken
from hvdtrain.sync_batch_norm import Link

_CLOSE = 1e-3


class FeaturePartitionedLinear(nn.Module):
    """``y = x W^T + b``, of which rank r of N holds the r-th part of W's columns; y is the same on every rank.

    All ranks must be given **the same batch**, and compute the same loss of it; then outputs, gradients and training are those
    of `torch.nn.Linear`, with an N-th of its memory on each rank. Every rank trains its part, and its copy of the layers
    around, by a plain ``loss.backward()`` and ``optimizer.step()``, without `Backend.replicate`, which refuses such a model:
    its ranks have different batches. Each forward pass sums the output over the ranks, and so does the backward pass with
    what it needs of a whole input that requires grad; every rank must make them together.

    What an optimizer does to each number by itself (SGD, Adam) is the same as ever. What looks at all gradients at once
    (clipping by norm, a GradScaler) sees this rank's part: sum over the ranks first.

    Args:
        in_features: Features of all ranks; fewer than there are ranks leave some without.
        out_features: Outputs.
        backend: A running backend, or one of its groups. Every rank must make the layer.
        bias: Add one; it is the same on every rank.
        device: Of the parameters; the backend's unless given.
        dtype: Of the parameters; torch's default unless given.

    Attributes:
        columns: Which input features this rank holds.
        weight: This rank's columns of W, shape (out_features, len(columns)).
        bias: Shape (out_features,), or None.

    Seeded alike on every rank, the layer begins as ``nn.Linear(in_features, out_features)`` does on a CPU, whatever the number
    of ranks. `state_dict` is this rank's; `full_state_dict` is the whole layer's.

    Raises:
        ConfigError: A number of features that cannot be.
    """

    parameters_differ_between_ranks = True
    """A replica, whose ranks hold the same parameters, refuses modules with this."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        backend: Communicator,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        wire = backend.wire
        self.in_features, self.out_features = in_features, out_features
        self.columns = share(in_features, wire.size, wire.rank)
        device = wire.device if device is None else device
        self.weight = nn.Parameter(torch.empty(out_features, len(self.columns), device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self._link = Link(backend)
        self._compared = wire.size == 1
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters as `torch.nn.Linear` does, from the CPU's generator; every rank must call it."""
        row = torch.empty(1, self.in_features, dtype=self.weight.dtype)
        for own in self.weight:
            nn.init.kaiming_uniform_(row, a=math.sqrt(5))  # a row at a time: the whole of W may not fit
            own.copy_(row[0, self.columns.start : self.columns.stop])
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            drawn = torch.empty(self.out_features, dtype=self.bias.dtype).uniform_(-bound, bound)
            self.bias.copy_(self._communicator.broadcast(drawn))

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output, the same on every rank.

        Args:
            input: The same batch on every rank: all features, shape (..., in_features), or on every rank its own alone, shape
                (..., len(columns)). Sparse (COO or CSR) in two dimensions too, if it requires no grad.

        Returns:
            Shape (..., out_features), dense.

        Raises:
            TrainingError: Another shape, or on every rank: the ranks have different batches.
        """
        width = input.shape[-1] if input.dim() else 0
        if width not in (self.in_features, len(self.columns)):
            raise TrainingError(
                f"expected {self.in_features} input features, or this rank's {len(self.columns)} of them, got shape {tuple(input.shape)}"
            )
        communicator = self._communicator
        if not self._compared:
            self._compare(input)
            self._compared = True
        sparse = input.layout != torch.strided
        if sparse and (input.dim() != 2 or input.requires_grad):
            raise TrainingError("a sparse input must have two dimensions and require no grad; use input.to_dense()")
        if width < self.in_features == 1:  # rank 0's own feature is all there are, and goes the way of a whole input
            input, width = nn.functional.pad(input, (0, 1)), 1
        if width == self.in_features:
            input = self._own_entries(input) if sparse else taken(input, self.columns, communicator)
        if sparse:
            with torch.autocast(input.device.type, enabled=False):  # there are no such products in half precision
                partial = torch.sparse.mm(input, self.weight.t())
        else:
            partial = nn.functional.linear(input, self.weight)
        output = summed(partial, communicator)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the whole layer's state, as `torch.nn.Linear` has it, on every rank; every rank must call it."""
        state = {"weight": torch.cat(self._communicator.all_gather(self.weight.detach()), dim=1)}
        if self.bias is not None:
            state["bias"] = self.bias.detach().clone()
        return state

    @torch.no_grad()
    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's part of a whole layer's state, written at any number of ranks or by `torch.nn.Linear`.

        Raises:
            ConfigError: Its names or shapes are not this layer's.
        """
        expected: dict[str, tuple[int, ...]] = {"weight": (self.out_features, self.in_features)}
        if self.bias is not None:
            expected["bias"] = (self.out_features,)
        found = {name: tuple(value.shape) for name, value in state.items()}
        if found != expected:
            raise ConfigError(f"the state of a whole layer has {expected}, got {found}")
        self.weight.copy_(state["weight"][:, self.columns.start : self.columns.stop])
        if self.bias is not None:
            self.bias.copy_(state["bias"])

    def get_extra_state(self) -> Tensor:
        """Which features a `state_dict` is of: the first, one after the last, and how many there are in all."""
        return torch.tensor([self.columns.start, self.columns.stop, self.in_features])

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse another rank's part, or that of another number of ranks.

        Raises:
            ConfigError: It is not this rank's.
        """
        if state.tolist() != self.get_extra_state().tolist():
            start, stop, whole = state.tolist()
            raise ConfigError(
                f"this state_dict is of features {start}:{stop} of {whole}, and this rank holds {self.columns.start}:{self.columns.stop} of "
                f"{self.in_features}. Each rank loads what it saved itself; for other ranks, full_state_dict() and load_full_state_dict()"
            )

    def extra_repr(self) -> str:
        """What `torch.nn.Linear` shows, and this rank's features."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"columns={self.columns.start}:{self.columns.stop}"
        )

    @property
    def _communicator(self) -> Communicator:
        communicator = self._link.communicator
        if communicator is None:
            raise TrainingError(
                "this FeaturePartitionedLinear was unpickled, and is joined to no ranks; make one on every rank, and give it what "
                "full_state_dict() returned"
            )
        return communicator

    def _own_entries(self, input: Tensor) -> Tensor:
        """This rank's columns of a sparse matrix."""
        whole = input.to_sparse_coo().coalesce()
        rows, columns = whole.indices()
        own = (columns >= self.columns.start) & (columns < self.columns.stop)
        indices = torch.stack([rows[own], columns[own] - self.columns.start])
        return torch.sparse_coo_tensor(
            indices, whole.values()[own], (input.shape[0], len(self.columns)), is_coalesced=True, check_invariants=False
        )

    @torch.no_grad()
    def _compare(self, input: Tensor) -> None:
        """Refuse different batches, at the first one; of a rank's own features only their number of rows can be seen."""
        rows = input if input.layout != torch.strided else input.reshape(input.shape[:-1].numel(), input.shape[-1])
        whole = input.shape[-1] == self.in_features
        seen = [float(rows.shape[0]), whole, 0.0, 0.0]
        if whole:  # a projection: rounding hardly moves it, another batch does
            seen[2:] = [float(_projection(rows)), float(_norm(rows))]
        everyone = self._communicator.all_gather_object(seen)
        if self.in_features > 1 and len({whole for _, whole, _, _ in everyone}) > 1:
            raise TrainingError(
                f"some ranks give a FeaturePartitionedLinear all {self.in_features} features, and others their own alone; do the same on all"
            )
        count, _, projection, norm = everyone[0]
        for rank, (other_count, other_whole, other, _) in enumerate(everyone):
            if other_count != count or (other_whole and abs(other - projection) > _CLOSE * norm):
                raise TrainingError(
                    f"ranks 0 and {rank} give a FeaturePartitionedLinear different batches, of {count:g} and {other_count:g} rows. Its "
                    "ranks hold parts of one layer and must all be given the same batch: no DistributedSampler, no "
                    "backend.loader(), no shuffling by a seed of the rank's own"
                )


def _projection(rows: Tensor) -> Tensor:
    left, right = (torch.arange(size, dtype=torch.float64).cos().to(rows.device, rows.dtype) for size in rows.shape)
    product: Tensor = torch.sparse.mm(rows, right[:, None])[:, 0] if rows.layout != torch.strided else rows @ right
    projection: Tensor = left.double() @ product.double()
    return projection


def _norm(rows: Tensor) -> Tensor:
    numbers = rows if rows.layout == torch.strided else rows.to_sparse_coo().coalesce().values()
    norm: Tensor = torch.linalg.vector_norm(numbers.double())
    return norm
