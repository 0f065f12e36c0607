"""The training loop, and nothing else: fetch, forward, backward, exchange, step, log; evaluate; save.

Which engine moves the gradients is the backend's business, what is learned the task's, how numbers are written down the
logger's. The loop promises that every sample counts once: whatever the number of ranks, the length of the data or the
batch size, a step follows the gradient of the mean loss over the global batch, and an evaluation is the mean over all
samples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hvdtrain.data.rank_batches import RankStep
from hvdtrain.data.rank_stream import Batches, StreamStep
from hvdtrain.errors import Preempted
from hvdtrain.observe.logger import EvalRecord
from hvdtrain.training.checkup import Tally
from hvdtrain.training.compiling import compile_ahead
from hvdtrain.training.fit_plan import EvaluationData, FitPlan
from hvdtrain.training.ledger import FitResult, Ledger
from hvdtrain.training.lone_sample import batches_without_samples_explained, lone_samples_explained
from hvdtrain.training.loop_state import rehearse
from hvdtrain.training.parts import Parts
from hvdtrain.training.position import check_loss
from hvdtrain.training.resume import go_on, resume, save

if TYPE_CHECKING:
    from hvdtrain.training.trainer import Trainer

_log = logging.getLogger(__name__)


class Loop:
    """One `hvdtrain.Trainer.fit`; every rank must run it alike.

    Args:
        trainer: Whom callbacks are told of.
        parts: What it trains with.
        plan: What is to be done.
        ledger: Where steps are counted.
    """

    def __init__(self, trainer: Trainer, parts: Parts, plan: FitPlan, ledger: Ledger) -> None:
        self._trainer, self._parts, self._plan, self._ledger = trainer, parts, plan, ledger
        self._batches = plan.batches
        self._skip_nonfinite = parts.options.skips_nonfinite
        self._total_steps = math.inf
        self._skipped = self._finishing = False  # the last step; training, by a callback of some rank

    def run(self, earlier: Batches | None) -> FitResult:
        """Train, evaluate and save as planned.

        Args:
            earlier: What the loop before this one read, if there was one.
        """
        parts, plan, position = self._parts, self._plan, self._parts.position
        self._ledger.begin_call()
        with parts.precision.arithmetic(), parts.own_random_numbers:
            resumed_from = self._begin(earlier)
            parts.events.started(self._trainer)
            if parts.events:
                self._stop_if_asked()
            while not self._is_over():
                self._train_epoch()
                regular = position.samples == 0 and position.epoch % plan.eval_every == 0
                if plan.evaluation is not None and (regular or self._is_over()):
                    self._evaluate(plan.evaluation, regular=regular)
                self._save()
                self._stop_if_asked()
            if plan.evaluation is not None and (plan.epochs == 0 or position.evaluated_at < position.steps):
                self._evaluate(plan.evaluation, regular=False)
            parts.replica.settle()
            self._settle()
        return self._ledger.result(resumed_from, self._stop_reason())

    def _begin(self, earlier: Batches | None) -> str | None:
        """Go on from a checkpoint, which is returned, or from where the loop before this one was."""
        parts, plan, position = self._parts, self._plan, self._parts.position
        resumed_from = None
        if plan.resume_from is not None:
            resumed_from = resume(
                parts.state, plan.resume_from, position, parts.options.seed, parts.backend, self._batches
            )
            if plan.goes_on(position):
                self._rehearse()
        else:
            go_on(earlier, self._batches, position)
        position.cut = self._batches.cut
        if parts.options.compiles and plan.goes_on(position):
            compile_ahead(parts.backend, parts.replica, self._first_loss())
        self._total_steps = plan.total_steps(position)
        parts.checkup.begin(position.steps)
        return resumed_from

    def _is_over(self) -> bool:
        """Whether training has come to its end; every rank calls it."""
        plan = self._plan
        return self._finishing or self._parts.position.has_ended(plan.epochs, plan.max_steps, self._batches.is_over)

    def _train_epoch(self) -> None:
        parts, batches, max_steps = self._parts, self._batches, self._plan.max_steps
        position, checkup, laps, every = parts.position, parts.checkup, parts.laps, parts.options.checkpoint_every
        whole_epoch = True
        parts.replica.module.train()
        laps.skip()
        for step in batches.steps(position.epoch, position.samples):
            laps.begin(timed=checkup.logs(position.steps + 1))
            with self._ledger.step(step.samples):
                self._train_step(step)
            position.advance(step.samples)
            parts.events.stepped(self._trainer, step.samples, skipped=self._skipped)
            due = bool(every) and position.steps % every == 0
            if checkup.due(position.steps):
                due |= self._hold_checkup()
            if due:
                self._save()
            if (self._finishing or position.steps >= max_steps) and not batches.is_over(position.samples):
                whole_epoch = False
                break
            laps.lap("other")
        parts.pending_loss.look()
        whole = parts.backend.all_reduce(
            torch.tensor([position.epoch_tally.loss_sum, position.epoch_tally.weight], dtype=torch.float64)
        ).tolist()
        position.train_loss = Tally(*whole).mean
        if whole_epoch:
            position.finish_epoch()
            parts.pacemaker.after_epoch()
            parts.events.finished_epoch(self._trainer)

    def _train_step(self, step: RankStep | StreamStep) -> None:
        """One global batch; also on a rank whose share of it is empty."""
        parts = self._parts
        replica, precision, laps, position = parts.replica, parts.precision, parts.laps, parts.position
        task, counting = parts.lesson.task, parts.lesson.counting
        for number, (loaded, indices) in enumerate(step, 1):
            batch = precision.cast(loaded)
            laps.lap("data")
            share = counting.share(batch, counting.samples(batch, indices, self._plan.seen), step.samples)
            with replica.accumulate(last=number == len(step.sizes)):
                with precision.autocast(), batches_without_samples_explained(indices), lone_samples_explained():
                    loss = task.loss(replica.model, batch)
                check_loss(loss)
                if share.weight:
                    parts.pending_loss.note(*counting.mean(loss, share))
                laps.lap("forward")
                replica.backward(precision.scale(loss), samples=indices, weight=share.weight, total=share.total)
                laps.lap("exchange" if number == len(step.sizes) else "backward")
        lr = replica.optimizer.param_groups[0]["lr"]
        self._ledger.lr = lr.clone() if isinstance(lr, Tensor) else lr  # a schedule writes into a tensor
        result = replica.step(
            clip_norm=parts.options.clip_norm,
            scaler=precision.scaler,
            skip_nonfinite=self._skip_nonfinite,
            want_norm=parts.checkup.wants_norm(position.steps + 1),
        )
        self._skipped = result.skipped
        if result.skipped:
            position.skipped_steps += 1
            _log.info("step %d: the gradient is not finite; no update on any rank", position.steps)
        else:
            parts.pacemaker.after_step()
        self._ledger.gradient_norm = result.gradient_norm
        laps.lap("optimizer")

    def _evaluate(self, data: EvaluationData, *, regular: bool) -> None:
        """Evaluate at this position, and say it; an evaluation only because the run ends here steps no schedule."""
        parts, position = self._parts, self._parts.position
        position.eval_metrics = parts.evaluator.metrics(
            parts.lesson.task,
            parts.lesson.counting,
            data.source,
            data.batch_size,
            data.seen,
            parts.events.inference(self._trainer),
        )
        position.evaluated_at = position.steps
        parts.logger.log_eval(EvalRecord(step=position.steps, epoch=position.epoch, metrics=position.eval_metrics))
        if regular:
            parts.pacemaker.after_evaluation(position.eval_metrics)
        parts.events.evaluated(self._trainer, regular=regular)

    # -- where the ranks talk -----------------------------------------------------------------------------------------

    def _hold_checkup(self) -> bool:
        """Log, stop if asked, and return whether it is time for a checkpoint."""
        parts, position = self._parts, self._parts.position
        parts.pending_loss.look()
        logged = parts.checkup.logs(position.steps)
        seconds = parts.laps.take() if logged else ()
        verdict = parts.checkup.hold(position.steps, position.take_recent(), seconds)
        if verdict.failed:
            self._settle()
        report = parts.logger.log_step if logged else parts.progress
        if report is not None:
            ranks = verdict.shared if logged else None
            report(self._ledger.record(self._total_steps, verdict.tally.mean, ranks))
        if verdict.stop:
            self._stop()
        self._finishing |= verdict.finish
        return verdict.save

    def _stop_if_asked(self) -> None:
        """After an evaluation, which may have been long."""
        verdict = self._parts.checkup.hold(self._parts.position.steps, Tally())
        if verdict.stop:
            self._stop()
        self._finishing |= verdict.finish

    def _stop(self) -> None:
        path = self._save()
        self._settle()
        where = f"saved {path}" if path else "nothing was saved, because there is no place for checkpoints"
        raise Preempted(f"asked to stop after step {self._parts.position.steps}; {where}")

    def _stop_reason(self) -> str:
        """Why the run ended early, the same on every rank."""
        if not self._finishing:
            return ""
        everyone = self._parts.backend.all_gather_object(self._parts.events.stop_reason)
        return next(reason for reason in everyone if reason)

    # -- saving -------------------------------------------------------------------------------------------------------

    def _save(self) -> str | None:
        parts = self._parts
        if parts.checkpoints is None:
            return None
        parts.pending_loss.look()
        path = save(parts.state, parts.checkpoints, parts.position, parts.options.seed, self._batches)
        parts.checkup.saved()
        parts.events.saved(self._trainer, path)
        return path

    def _settle(self) -> None:
        """Know that what was saved is on the disk, or fail on all ranks."""
        if self._parts.checkpoints is not None:
            self._parts.checkpoints.settle(self._parts.backend)

    # -- before the first step ----------------------------------------------------------------------------------------

    def _rehearse(self) -> None:
        forward = self._first_loss()
        if forward is not None:
            rehearse(self._parts.replica, forward)

    def _first_loss(self) -> Callable[[nn.Module], Tensor] | None:
        """What computes the loss of this rank's first batch; None, on all ranks, if some rank has none."""
        precision, task = self._parts.precision, self._parts.lesson.task
        first = self._batches.example(self._parts.position.epoch)
        if first is None:
            return None
        batch = precision.cast(first)

        def forward(model: nn.Module) -> Tensor:
            with precision.autocast():
                return task.loss(model, batch)

        return forward
