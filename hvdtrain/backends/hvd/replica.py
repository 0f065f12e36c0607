"""Gradients in Horovod's all-reduce: named packs, sent from hooks."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.backends.hooked import HookedReplica, Pack
from hvdtrain.backends.hvd.library import hvd
from hvdtrain.backends.hvd.waiting import Waiter
from hvdtrain.backends.hvd.wire import HorovodWork
from hvdtrain.backends.replica_options import ReplicaOptions
from hvdtrain.backends.weighting import Tally
from hvdtrain.backends.wire import Work
from hvdtrain.errors import ConfigError
from hvdtrain.settings.horovod_config import HorovodConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from hvdtrain.backends.base import Backend


_replicas = itertools.count()  # of this process; every rank counts alike, so that packs of two replicas are told apart


class HorovodReplica(HookedReplica):
    """Packs of gradients in Horovod's all-reduce.

    Args:
        config: What was asked of Horovod.
        waiter: Bounds every wait.
        options: As for `Replica`.
    """

    _suitable_bucket_bytes = 4 * 2**20
    _by_order = False

    def __init__(
        self,
        backend: Backend,
        module: nn.Module,
        optimizer: Optimizer | None,
        options: ReplicaOptions,
        *,
        config: HorovodConfig,
        waiter: Waiter,
    ) -> None:
        self._config, self._waiter = config, waiter
        number = next(_replicas)
        self._label = f"gradient.{number}" if number else "gradient"
        self._adasum = config.op == "adasum"
        self._engine_averages = (
            self._adasum
        )  # each rank's own mean gradient goes in, and a combination of them comes out
        compression = config.compression
        if options.reduce_dtype is not None:
            config.check_reduce_dtype("reduce_dtype (--reduce-dtype)", bf16=options.reduce_dtype == torch.bfloat16)
        groups = 0 if self._adasum and config.num_groups is None else config.num_groups  # Adasum weighs each tensor
        super().__init__(
            backend, module, optimizer, options, carried=lambda dtype: _carried(dtype, compression), groups=groups
        )

    def _send(self, pack: Pack) -> Work:
        # Of bfloat16 too, whose two exchanges are those of a ring.
        self._backend.traffic.all_reduce(sum(tensor.nbytes for tensor in pack.tensors), self._backend.world_size)
        if pack.dtype == torch.bfloat16:
            return Bf16Sum(self._waiter, self._backend.world_size, f"{self._label}.{pack.name}", pack.tensors)
        op = hvd.Adasum if self._adasum else hvd.Sum
        factor = self._config.gradient_predivide_factor
        scales = {} if factor == 1.0 else {"prescale_factor": 1.0 / factor, "postscale_factor": factor}
        name = f"{self._label}.{pack.name}"
        tensors = [
            torch.view_as_real(t) if t.is_complex() else t for t in pack.tensors
        ]  # Horovod knows no complex numbers

        def start() -> Any:
            if len(tensors) == 1:
                return hvd.allreduce_async_(tensors[0].view(-1), name=name, op=op, **scales)
            return hvd.grouped_allreduce_async_(tensors, name=name, op=op, **scales)

        names = [self._names[id(p)] for p in pack.parameters]
        return HorovodWork(
            self._waiter, start, f"the gradients of {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        )

    def _expect(self, tally: Tally) -> None:
        # Adasum would take zeros for a gradient that the others' is orthogonal to, and make a sum of the mean.
        super()._expect(replace(tally, ranks=0) if self._adasum and self._weighting.empty else tally)

    def _send_tally(self, tensor: Tensor) -> Work:
        self._backend.traffic.all_reduce(tensor.nbytes, self._backend.world_size)
        name = f"{self._label}.tally"  # one name for all steps: Horovod's cache knows it from the second on
        return HorovodWork(
            self._waiter, lambda: hvd.allreduce_async_(tensor, name=name, op=hvd.Sum), "the samples of a step"
        )

    def _scale(self, tally: Tally) -> None:
        if self._adasum and tally.ranks < self._backend.world_size:
            raise ConfigError(
                "--horovod.op adasum combines one gradient of every rank, and some rank has no sample in this step, or none "
                "with a weight; use a data set or batch size that gives every rank samples that count"
            )
        super()._scale(tally)


class Bf16Sum:
    """A sum of bfloat16 tensors over the world in half the bytes of float32, by engines that know no bfloat16.

    Every rank receives its slice of all ranks' tensors as raw bytes, sums it in float32, rounds once, and all gather the
    slices. Two exchanges instead of one, as in a ring; the second starts in `advance`.
    """

    def __init__(self, waiter: Waiter, world_size: int, name: str, tensors: list[Tensor]) -> None:
        self._waiter, self._world_size, self._name, self._tensors = waiter, world_size, name, tensors
        n = world_size
        flat = torch.cat([t.reshape(-1) for t in tensors])
        self._numel = flat.numel()
        self._slice = -(-self._numel // n)
        padded = torch.zeros(self._slice * n, dtype=torch.bfloat16, device=flat.device)
        padded[: self._numel] = flat
        sent = padded.view(torch.uint8)
        splits = torch.full((n,), self._slice * 2, dtype=torch.int32)
        self._first: HorovodWork | None = HorovodWork(
            waiter,
            lambda: hvd.alltoall_async(sent, splits=splits, name=f"bf16.{name}"),
            f"bf16 exchange of {name}",
            self._sum,
        )
        self._second: HorovodWork | None = None

    def advance(self) -> None:
        """Wait for the first exchange and start the second."""
        if self._first is not None:
            self._first.wait()
            self._first = None

    def wait(self) -> object:
        """Block until the tensors hold the sum."""
        self.advance()
        assert self._second is not None
        return self._second.wait()

    def is_completed(self) -> bool:
        """Say whether `wait` would return at once."""
        return self._first is None and self._second is not None and self._second.is_completed()

    def _sum(self, output: Any) -> None:
        received = output[0] if isinstance(output, tuple) else output
        mine = received.view(torch.bfloat16).view(self._world_size, self._slice)
        total = mine.float().sum(0).bfloat16()
        self._second = HorovodWork(
            self._waiter,
            lambda: hvd.allgather_async(total.view(torch.uint8), name=f"bf16.{self._name}.gather"),
            f"bf16 exchange of {self._name}",
            self._copy_out,
        )

    def _copy_out(self, output: Tensor) -> None:
        whole = output.view(torch.bfloat16)[: self._numel]
        for tensor, part in zip(self._tensors, whole.split([t.numel() for t in self._tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _carried(dtype: torch.dtype, compression: str) -> torch.dtype:
    """The dtype in which gradients of ``dtype`` are sent. Horovod has no bfloat16, and halves overflow when summed."""
    if dtype.is_complex:
        return dtype
    if compression != "none":
        return torch.float16 if compression == "fp16" else torch.bfloat16
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
