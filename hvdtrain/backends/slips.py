"""What to say to somebody whose training step cannot be made as it was written."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hvdtrain.backends.sparse import unexpected
from hvdtrain.errors import TrainingError

WEIGHTLESS = (
    "no loss of this step had any weight on any rank (the weight= of every backward() was 0), so that there is no mean to follow; "
    "give the global batch something that counts, or skip such steps: replica.step(skip_nonfinite=True), --on-nan skip"
)

AFTER_THE_LAST = (
    "backward() after this step's last micro-batch; call step() first. If they belong to one step, mark the earlier micro-"
    "batches with `with replica.accumulate(last=False):`; two losses of one forward pass are added (loss_1 + loss_2) or get "
    "retain_graph=True as well"
)
REACHED_ANOTHER = (
    "this backward pass added to gradients of another replica that had been exchanged already; call that replica's step() "
    "first, or freeze what the loss must not reach"
)
INTERRUPTED = (
    "an exception ended backward() while it exchanged gradients with the other ranks, which cannot be taken up again; let "
    "it end the run, and continue from a checkpoint"
)
NOT_EXCHANGED = (
    "optimizer.step() on gradients that were not exchanged with the other ranks; call replica.backward(loss, "
    "samples=...) and replica.step(), or replica.reduce_gradients() before optimizer.step()"
)
LEFT_OVER = (
    "optimizer.step() on gradients that were there before, or were not exchanged with the other ranks; call "
    "optimizer.zero_grad() or replica.clear() after each step, then replica.backward(loss, samples=...)"
)
CHANGED_AFTER_CUTTING = (
    "parameters were frozen, unfrozen, added or removed after the model was cut over the ranks (shard_modules=); do that "
    "before replicate()"
)


def check_scalar(loss: Tensor, rank: int, *, counts: bool) -> None:
    """Refuse a loss that cannot be minimised.

    Args:
        loss: Of a micro-batch.
        rank: This one.
        counts: It has samples and a weight.

    Raises:
        TrainingError: It is no scalar, or depends on no parameter although it counts.
    """
    if loss.numel() != 1:
        raise TrainingError(
            f"the loss must be a scalar, the mean over the micro-batch's samples; got shape {tuple(loss.shape)}"
        )
    if not loss.requires_grad and counts:
        raise TrainingError(
            f"rank {rank}: the loss depends on no parameter that requires grad (computed under torch.no_grad(), "
            "from detached outputs, or by frozen layers alone). A rank without samples in a step calls replica.step() alone"
        )


def frozen_too_late(name: str) -> TrainingError:
    """Of a parameter that has a gradient although it is frozen."""
    return TrainingError(
        f"{name!r} was frozen after the forward pass of this step, and has a gradient that was not exchanged; "
        "freeze before the forward pass, or call replica.clear() first"
    )


def unused(names: Sequence[str], rank: int) -> TrainingError:
    """Of a loss that did not depend on parameters, as far as their names are known."""
    named = f": {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else " in the last micro-batch"
    return TrainingError(
        f"rank {rank}: the loss did not depend on some parameters{named}. Freeze them, use them, or pass "
        "find_unused_parameters=True (--find-unused-parameters)"
    )


def explained_backward(error: RuntimeError) -> TrainingError | None:
    """The engine's and autograd's words for what a user did, in ours; None for other errors."""
    text = str(error)
    if "backward through the graph a second time" in text:
        return TrainingError(
            "two backward passes through one graph. Two losses of one forward pass: replica.backward(loss_1 + loss_2, samples=...), "
            "or replica.backward(loss_1, samples=..., retain_graph=True) inside `with replica.accumulate(last=False):` before the other"
        )
    if "mark a variable ready only once" in text or "marked as ready twice" in text:
        return TrainingError(
            "a gradient was completed twice in one backward pass, and had been sent the first time. Reentrant activation "
            "checkpointing does that: pass use_reentrant=False"
        )
    if "cached during selective activation checkpoint has been mutated" in text:
        return TrainingError(
            "selective activation checkpointing keeps the result of a product or convolution that the next operation writes into; let "
            "that be no in-place one, such as ReLU(inplace=True), or use --checkpoint-policy full"
        )
    if "access storage of SparseTensorImpl" in text or "Expected variable to have sparse gradient" in text:
        return unexpected("a parameter")
    return None
