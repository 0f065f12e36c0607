"""The type in which gradients travel between the ranks, where another one than their own was asked for.

Each rank's part of the mean is rounded to it, the ranks' parts are summed in it, and the sum is a gradient of the parameter's
own type again, which is what clipping and the optimizer see. What ranks count with their gradients travels as it is, and so
do sparse gradients. In a world of one nothing travels, and nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvdtrain.backends.exclusions import sentence
from hvdtrain.backends.traffic import Traffic
from hvdtrain.errors import ConfigError

REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WIDE = (torch.float64, torch.complex64, torch.complex128)


def reduce_dtype_of(name: str | None) -> torch.dtype | None:
    """The type of a name; None for None and "auto": each gradient's own.

    Raises:
        ConfigError: There is none of that name.
    """
    if name is None or name == "auto":
        return None
    if name not in REDUCE_DTYPES:
        raise ConfigError(f"reduce_dtype must be one of auto, {', '.join(REDUCE_DTYPES)}, got {name!r}")
    return REDUCE_DTYPES[name]


def check_reduce_dtype(parameters: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype | None) -> None:
    """Refuse parameters whose gradients hold more than a type could carry.

    Raises:
        ConfigError: One is of float64 or complex; names it.
    """
    for name, parameter in () if dtype is None else parameters:
        if parameter.requires_grad and parameter.dtype in _WIDE:
            raise ConfigError(f"{name!r} is of {parameter.dtype}: {sentence('reduce_dtype', 'wide_parameters')}")


def overflowed(gradients: Iterable[Tensor]) -> str:
    """Say what is wrong with averaged gradients that travelled as float16; "" if all are finite.

    They are the same on every rank, and so is the answer.
    """
    # A sum shows each NaN and infinity, and is many times faster than a norm; float16's numbers cannot overflow it.
    sums = [(g.coalesce().values() if g.is_sparse else g).sum(dtype=torch.float32) for g in gradients]
    if not sums or bool(torch.stack(sums).isfinite().all()):
        return ""
    return (
        "the averaged gradient is not finite: it was too large for float16, as which it travelled (reduce_dtype), or the loss was not "
        "finite. Use --reduce-dtype bf16, a GradScaler (--precision fp16), or skip such steps: --on-nan skip, "
        "replica.step(skip_nonfinite=True)"
    )


class Buckets:
    """A communication hook of DistributedDataParallel: averages a bucket of gradients in another type, or as pairs of real numbers.

    torch's own hooks refuse bfloat16 on Gloo and divide after rounding; without one, Gloo of torch 2.4 sums no complex numbers.

    Args:
        dtype: What travels; None: what is. Buckets of float64, complex and of sparse gradients always travel as they are.
        world_size: What the sum is divided by, before it is made, so that no sum overflows where the mean does not.
        traffic: Told of what is sent.
    """

    def __init__(self, dtype: torch.dtype | None, world_size: int, traffic: Traffic) -> None:
        self._traffic = traffic
        self._dtype = dtype
        self._world_size = world_size
        self._sent: dict[
            int, Tensor
        ] = {}  # by bucket: large memory that is asked for anew in each step costs page faults

    def __call__(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Begin the exchange of a bucket."""
        whole = bucket.buffer()
        if self._dtype is None or whole.is_sparse or whole.dtype in _WIDE:
            return self._summed(whole.div_(self._world_size), lambda _: whole)
        sent = self._sent.get(bucket.index())
        if sent is None or sent.shape != whole.shape:
            sent = self._sent[bucket.index()] = torch.empty_like(whole, dtype=self._dtype)
        torch.div(whole, self._world_size, out=sent)
        return self._summed(sent, whole.copy_)

    def _summed(self, tensor: Tensor, finish: Callable[[Tensor], Tensor]) -> torch.futures.Future[Tensor]:
        if not tensor.is_sparse:
            self._traffic.all_reduce(tensor.nbytes, self._world_size)
        work = dist.all_reduce(torch.view_as_real(tensor) if tensor.is_complex() else tensor, async_op=True)
        assert work is not None
        averaged: torch.futures.Future[Tensor] = work.get_future().then(lambda _: finish(tensor))
        return averaged


def send_bucket(state: Buckets, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """`Buckets` as DistributedDataParallel takes a hook."""
    return state(bucket)


# torch compares the types themselves, and this module's are names of types.
send_bucket.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}


def check_sums(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a type in which the process group cannot sum; every rank must call it.

    Raises:
        ConfigError: It cannot, as Gloo could not sum bfloat16 in older versions of torch.
    """
    try:
        dist.all_reduce(torch.ones(1, dtype=dtype, device=device))
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"reduce_dtype (--reduce-dtype): this process group cannot sum {dtype} (torch {torch.__version__}: {error}); use fp16 or fp32"
        ) from error
