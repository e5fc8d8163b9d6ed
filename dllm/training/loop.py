"""The training loop: optimizer steps, accumulation, pooling over ranks, validation, logging, checkpoints.

It knows nothing of what is trained. Losses and figures are sums until the end: a step's gradient is that of
sum(numerators) / sum(denominators) over all micro-batches of all ranks, so no split of a batch changes it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dllm.config.params import Train
from dllm.errors import DataError, StageError
from dllm.files import atomic_folder
from dllm.models.sharding import is_sharded, load_shards, named_like, own_shards
from dllm.process.signals import SIGNALS, Interrupt
from dllm.progress import Progress
from dllm.tracking.runs import Tracker
from dllm.training import launch, metrics
from dllm.training.checkpoints import Checkpoints, TrainState
from dllm.training.distributed import Ranks, peers_watched
from dllm.training.journal import MetricsLog, Phase
from dllm.training.optimizer import Optimizers, lr_factor
from dllm.training.order import Order, derive_seed, micro_batches
from dllm.training.strategy import Strategy


@dataclass(frozen=True)
class Outcome:
    """The result of a finished run: its best checkpoint and its totals."""

    checkpoint: Path
    step: int
    steps: int
    seconds: float
    tokens: int
    predictions: int
    validation: dict[str, float]


class Loop:
    """One run, resumable at any step.

    Args:
        strategy: what is trained.
        settings: the train section.
        ranks: this process among its peers.
        work: directory of this run; the same for all ranks.
        tracker: where figures go; a null one on ranks above 0.
        mfu_dtype: dtype whose matrix-product peak mfu is held against; None leaves mfu out.
    """

    def __init__(
        self,
        strategy: Strategy,
        settings: Train,
        ranks: Ranks,
        *,
        work: Path,
        tracker: Tracker,
        mfu_dtype: torch.dtype | None = None,
    ) -> None:
        if not len(strategy.train_rows):
            raise DataError("no rows to train on", hint="check the regenerated responses and train.max_length")
        self.strategy, self.settings, self.ranks = strategy, settings, ranks
        self.sharded = is_sharded(strategy.model)
        self.order = Order(
            strategy.train_rows, settings.batch_size * ranks.world * settings.grad_accumulation, settings.seed
        )
        self.total = max(1, round(settings.epochs * self.order.steps_per_epoch))
        self.optimizer = Optimizers(strategy.model, settings.optimizer, strategy.adamw_rates)
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(work / "checkpoints", settings.keep_checkpoints)
        self.journal = MetricsLog(work / "training.jsonl" if ranks.is_main else None, tracker)
        self.state = TrainState()
        self.interval, self.totals = self._new_sums(), self._new_sums()
        self._clock = 0.0
        self._peak = ranks.sum(metrics.peak_flops(ranks.device, mfu_dtype)) if mfu_dtype is not None else None

    def run(self) -> Outcome:
        """Train to the last step, from the newest checkpoint if there is one.

        Raises:
            StageError: the loss is no longer finite.
        """
        self._restore()
        state, settings = self.state, self.settings
        shown = self.ranks.is_main
        with (
            Progress("train", self.total, "steps", initial=state.step, shown=shown) as bar,
            self._waits() as interrupt,
        ):
            self._clock = time.perf_counter()
            while state.step < self.total:
                stop_signal = self._step(interrupt)
                state.interval_seconds += self._lap()
                last = state.step == self.total
                shown_figures: dict[str, float | None] = {}
                if last or state.step % settings.log_every == 0:
                    shown_figures |= self._log()
                if last or state.step % settings.validate_every == 0:
                    shown_figures |= self._validate()
                    self._lap()
                    self._checkpoint()
                elif stop_signal is not None:
                    self._checkpoint()
                bar.update(1, **shown_figures)
                if stop_signal is not None:
                    interrupt.deliver(stop_signal)
        totals = self.totals.read()
        assert state.best_step is not None  # the last step validates
        return Outcome(
            checkpoint=self._whole(self.checkpoints.at(state.best_step)),
            step=state.best_step,
            steps=self.total,
            seconds=state.seconds,
            tokens=round(totals["tokens"][0]),
            predictions=round(totals["predictions"][0]),
            validation=dict(state.best_validation),
        )

    def _waits(self) -> Interrupt:
        # A rank whose peers are gone waits for them in vain; one alone may finish its step.
        return Interrupt(launch.GRACE_S - 3 if self.ranks.world > 1 else math.inf)

    def _step(self, interrupt: Interrupt) -> int | None:
        """Take one optimizer step; return the signal that any rank has received, or None."""
        state = self.state
        sums, stop_signal = self._gradient(interrupt)
        norm = float(self.optimizer.clip())
        if not math.isfinite(norm):
            raise StageError(
                f"gradient is not finite at step {state.step + 1}",
                where="train.optimizer",
                hint="lower train.optimizer.lr, or train in float32; the last checkpoint is kept",
            )
        self.optimizer.set_lr(self._lr_factor(state.step))
        self.optimizer.step()
        sums.add("grad_norm", norm)
        sums.add("steps", 1)
        for running in (self.interval, self.totals):
            running.vector += sums.vector
        state.step += 1
        return stop_signal

    def _gradient(self, interrupt: Interrupt) -> tuple[metrics.Sums, int | None]:
        """Compute the gradient of the pooled loss; return the pooled sums, and a signal if any was received."""
        state, ranks, settings = self.state, self.ranks, self.settings
        torch.manual_seed(derive_seed(settings.seed, state.step, ranks.rank))  # so random numbers need no saving
        sums, epoch = self._new_sums(), self.order.epoch(state.step)
        self.strategy.model.train()
        for rows, counts in self._micro_batches(self.order.step_rows(state.step)):
            with peers_watched():
                terms = self.strategy.terms("train", rows, epoch)
                if terms.numerator.requires_grad:
                    (terms.numerator if counts else 0 * terms.numerator).backward()
            if counts:
                sums.add_terms(terms)
        denominator, stop_signal = self._pool(sums, interrupt)
        parameters = self.optimizer.parameters.values()
        ranks.sum_gradients(parameters, summed=self.sharded)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.div_(denominator)
        return sums, stop_signal

    def _micro_batches(self, rows: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
        """Yield this rank's micro-batches, and whether they count: sharded ranks run as many passes."""
        size, ranks = self.settings.batch_size, self.ranks
        for part in micro_batches(rows, size, ranks.rank, ranks.world, in_step=self.sharded):
            yield part or list(rows[:1]), bool(part)

    def _pool(self, sums: metrics.Sums, interrupt: Interrupt) -> tuple[float, int | None]:
        # Signals are reduced with the sums, so that all ranks stop after the same step.
        flags = [float(interrupt.received == number) for number in SIGNALS]
        message = torch.cat([sums.vector, torch.tensor(flags, dtype=torch.float64).to(sums.vector)])
        self.ranks.sum_(message)
        sums.vector.copy_(message[: -len(flags)])
        received = [n for n, flag in zip(SIGNALS, message[-len(flags) :].tolist(), strict=True) if flag]
        denominator = sums.read()["denominator"][0]
        if denominator <= 0:
            raise DataError("an optimizer step found no supervised token", hint="check the regenerated responses")
        return denominator, received[0] if received else None

    def _log(self) -> dict[str, float | None]:
        state, sums = self.state, self.interval.read()
        seconds = state.interval_seconds
        flops = sums["flops"][0]
        record: dict[str, float | None] = {
            "loss": sums["numerator"][0] / sums["denominator"][0],
            "grad_norm": sums["grad_norm"][0] / sums["steps"][0],
            "lr": self.settings.optimizer.lr * self._lr_factor(state.step - 1),
            "mem": self.ranks.max(metrics.memory_gib(self.ranks.device)),
            "tokens_per_s": sums["tokens"][0] / seconds,
            f"{self.strategy.predictions_name}_per_s": sums["predictions"][0] / seconds,
            "mfu": flops / seconds / self._peak if self._peak and flops else None,
            **self.strategy.metrics(sums),
        }
        self._record("train", record)
        self.interval, state.interval_seconds = self._new_sums(), 0.0
        return {name: record[name] for name in self.strategy.shown if name in record}

    def _validate(self) -> dict[str, float | None]:
        """Validate on the held-out rows, with the same blocks every time; record the best validation."""
        state, rows = self.state, self.strategy.heldout_rows
        by_length = sorted(range(len(rows)), key=lambda i: (rows.lengths[i], rows.ids[i]))
        pooled = self._new_sums()
        self.strategy.model.eval()
        with torch.no_grad():
            for part, counts in self._micro_batches(by_length):
                with peers_watched():
                    terms = self.strategy.terms("heldout", part, 0)
                if counts:
                    pooled.add_terms(terms)
        self.ranks.sum_(pooled.vector)
        sums = pooled.read()
        found: dict[str, float] = {}
        if sums["denominator"][0] > 0:
            found = {"loss": sums["numerator"][0] / sums["denominator"][0], **self.strategy.metrics(sums)}
        state.last_validation = {f"val_{name}": value for name, value in found.items()}
        # Without held-out rows the newest checkpoint counts as the best.
        score = list(self.strategy.score(state.last_validation)) if found else []
        if not state.best_score or score > state.best_score:
            state.best_score, state.best_step = score, state.step
            state.best_validation = dict(state.last_validation)
        if found:
            self._record("validation", state.last_validation)
        return {name: state.last_validation[name] for name in self.strategy.shown if name in state.last_validation}

    def _record(self, kind: Phase, figures: Mapping[str, float | None]) -> None:
        step = self.state.step
        self.journal.write(kind, step, step / self.order.steps_per_epoch, figures)

    def _lap(self) -> float:
        """Add the time since the last call to the run's total, and return it."""
        before, self._clock = self._clock, time.perf_counter()
        self.state.seconds += self._clock - before
        return self._clock - before

    def _checkpoint(self) -> None:
        self.state.interval, self.state.totals = self.interval.vector.tolist(), self.totals.vector.tolist()
        ranks, model = self.ranks, self.strategy.model
        if self.sharded:
            optimizer = own_shards(self.optimizer.state(), is_main=ranks.is_main)
            weights = own_shards(model.state_dict(keep_vars=True), is_main=ranks.is_main)
            self.checkpoints.save_shard(self.state.step, optimizer, ranks.rank, ranks.world, weights)
            ranks.barrier()  # all shards are written before rank 0 moves them into the checkpoint
        if ranks.is_main and self.sharded:
            self.checkpoints.save(self.state, {}, shards=ranks.world)
        elif ranks.is_main:
            self.checkpoints.save(self.state, self.optimizer.state(), self.strategy.save)
        self.ranks.barrier()  # no rank goes on, or ends, before the checkpoint is whole

    def _whole(self, checkpoint: Path) -> Path:
        """Return a checkpoint with whole weights, after a check of them: of a sharded one, rank 0 writes a copy."""
        if not self.ranks.is_main:
            return checkpoint
        shards = self.checkpoints.weights(checkpoint)
        if shards is None:
            return checkpoint
        with atomic_folder(self.work / "whole") as aside:
            self.strategy.save(aside, named_like(self.strategy.model, shards))
        return self.work / "whole"

    def _restore(self) -> None:
        newest = self.checkpoints.latest()
        if newest is not None:
            self.state, moments, weights = self.checkpoints.load(newest, self.ranks.rank, self.ranks.world)
            self.ranks.barrier()  # each rank has checked its share of the files before any uses them
            if weights is None:
                self.strategy.load(newest)
            else:
                load_shards(self.strategy.model, weights)
            self.optimizer.load_state(moments)
            for sums, saved in ((self.interval, self.state.interval), (self.totals, self.state.totals)):
                if len(saved) != len(sums.vector):
                    raise StageError(
                        "this unfinished run was begun by a version that keeps other metrics",
                        where=str(newest),
                        hint="finish it with that version, or delete its folder in work/train to start anew",
                    )
                sums.vector.copy_(torch.tensor(saved, dtype=torch.float64))
            if self.ranks.is_main:
                print(f"train: resumes after step {self.state.step} of {self.total}", file=sys.stderr, flush=True)
        self.journal.rewind(self.state.step)
        if not self.sharded:
            self.ranks.share_weights(self.strategy.model)

    def _lr_factor(self, step: int) -> float:
        optimizer = self.settings.optimizer
        return lr_factor(step, self.total, schedule=optimizer.schedule, warmup_ratio=optimizer.warmup_ratio)

    def _new_sums(self) -> metrics.Sums:
        return metrics.Sums(self.strategy.counts, self.ranks.device)
