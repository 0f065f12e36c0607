"""What to say to somebody whose training step cannot be made as it was written."""

from __future__ import annotations

from collections.abc import Sequence

from hvdtrain.backends.sparse import unexpected
from hvdtrain.errors import TrainingError

WEIGHTLESS = (
    "no loss of this step had any weight on any rank (the weight= of every backward() was 0), so that there is no mean to follow; "
    "give the global batch something that counts, or skip such steps: replica.step(skip_nonfinite=True), --on-nan skip"
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
