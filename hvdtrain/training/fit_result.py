"""What a training run did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """What a `hvdtrain.Trainer.fit` did, the same on every rank.

    Attributes:
        epochs: Epochs completed, those before a resume included.
        steps: Optimizer steps, those before a resume included; skipped ones count.
        skipped_steps: Steps without an update, because the gradient was not finite.
        train_loss: Mean over the samples of the last epoch (or part of one) that was trained.
        eval_metrics: Of the last evaluation; empty without one.
        samples: Samples trained on in this call.
        train_seconds: Time spent in training steps, without evaluation and checkpoints.
        stopped: Why a callback ended the run before its epochs or steps; "" if none did.
        resumed_from: The checkpoint that this call continued from, or None.
    """

    epochs: int
    steps: int
    skipped_steps: int
    train_loss: float
    eval_metrics: dict[str, float] = field(default_factory=dict)
    samples: int
    train_seconds: float
    resumed_from: str | None
    stopped: str = ""
