"""The PyTorch side of a step: hidden states -> statistics -> selection -> masked loss -> AdamW."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tip_exp.batching import MicroBatch, micro_batches
from tip_exp.config import LearnerConfig
from tip_exp.diagnostics import token_metrics
from tip_exp.divergence import Divergence
from tip_exp.loss import BACKENDS
from tip_exp.meter import MIB, Meter
from tip_exp.models import Pair
from tip_exp.rollout.types import Rollout
from tip_exp.scores import STATISTICS
from tip_exp.scoring import Statistics, normalized_entropy, score_tokens, top_tokens
from tip_exp.selection import Selection, Selector, Tokens

SHOWN_TOKENS = 5  # of each model, at each position that is shown


@dataclass(frozen=True, slots=True)
class Likeliest:
    """What a model would have written next: ids and probabilities, both (N, SHOWN_TOKENS)."""

    ids: Tensor
    probabilities: Tensor


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one update did: its metrics, and every token's numbers (order: `tokens`).

    `likeliest` ("student", "teacher") covers the first rollouts alone, as many as `step` was told to show.
    """

    metrics: dict[str, float]
    tokens: Tokens
    statistics: Statistics
    selection: Selection
    likeliest: dict[str, Likeliest]


class Learner:
    """Holds the optimizer; `step` makes one update from one batch of rollouts."""

    def __init__(self, pair: Pair, selector: Selector, settings: LearnerConfig, *, seed: int, meter: Meter) -> None:
        self.pair, self.selector, self.settings, self.seed, self.meter = pair, selector, settings, seed, meter
        self.divergence = Divergence(settings.divergence, settings.jsd_beta)
        self.parameters = [p for p in pair.student.module.parameters() if p.requires_grad]
        beta1, beta2 = settings.betas
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=(beta1, beta2), weight_decay=settings.weight_decay, fused=True
        )

    def step(self, rollouts: list[Rollout], step: int, *, show: int = 0) -> StepReport:
        """One optimizer step, number `step` (from 1), on the tokens the selector keeps.

        Of the first `show` rollouts the report says what both models would have written, before the update.
        """
        device = self.pair.student.module.device
        batches = [
            batch.to(device) for batch in micro_batches(rollouts, self.settings.micro_batch_tokens, self.pair.pad_id)
        ]
        with self.meter.span("teacher"), torch.no_grad():
            teacher_hidden = [self.pair.teacher.final_hidden(batch) for batch in batches]
        with self.meter.span("learner"):
            wanted = self._wanted(step)
            # With one micro-batch its graph is kept from here to the loss, else each is run again with gradient.
            keep_graph = len(batches) == 1
            student_hidden: list[Tensor] = []
            if keep_graph or wanted or show:
                with torch.set_grad_enabled(keep_graph):
                    student_hidden = [self.pair.student.final_hidden(batch) for batch in batches]
            with self.meter.span("score", allocations=True):
                statistics = self._score(batches, student_hidden, teacher_hidden, wanted)
            likeliest = self._likeliest(batches, student_hidden, teacher_hidden, show)
            tokens = _tokens(batches)
            selection = self.selector(statistics, tokens, self._generator(step))
            loss_sum = self._backward(batches, teacher_hidden, student_hidden if keep_graph else None, selection.kept)
            metrics = self._update(loss_sum, int(selection.kept.sum()), step)
        metrics["select/kept_tokens"] = float(selection.kept.sum())
        metrics["select/response_tokens"] = float(len(tokens))
        metrics["select/kept_frac"] = metrics["select/kept_tokens"] / max(1, len(tokens))
        metrics |= token_metrics(statistics, tokens, selection, self.selector)
        if "entropy" in statistics and len(tokens):
            width = self.pair.student.head.vocab_size
            metrics["score/entropy_norm_mean"] = float(normalized_entropy(statistics["entropy"], width).mean())
        return StepReport(metrics, tokens, statistics, selection, likeliest)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's; the weights are the student's own folder."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def _wanted(self, step: int) -> frozenset[str]:
        """Statistics to measure: all on a diagnostic step, else what the selector reads."""
        every = self.settings.diagnostics_every
        return frozenset(STATISTICS) if every and step % every == 0 else self.selector.reads

    def _score(
        self, batches: list[MicroBatch], student: list[Tensor], teacher: list[Tensor], wanted: frozenset[str]
    ) -> Statistics:
        if not wanted:
            return {}
        scored = [
            score_tokens(
                ours.detach(),
                theirs,
                batch.token_ids,
                self.pair.student.head,
                self.pair.teacher.head,
                wanted=wanted,
                tile_bytes=self.settings.tile_mib * MIB,
                jsd_beta=self.settings.jsd_beta,
            )
            for batch, ours, theirs in zip(batches, student, teacher, strict=True)
        ]
        return {name: torch.cat([one[name] for one in scored]) for name in wanted}

    def _likeliest(
        self, batches: list[MicroBatch], student: list[Tensor], teacher: list[Tensor], show: int
    ) -> dict[str, Likeliest]:
        if not show:
            return {}
        found: dict[str, Likeliest] = {}
        for name, model, hidden in (
            ("student", self.pair.student, student),
            ("teacher", self.pair.teacher, teacher),
        ):
            rows = [one.detach()[batch.rollout < show] for batch, one in zip(batches, hidden, strict=True)]
            tile_bytes = self.settings.tile_mib * MIB
            found[name] = Likeliest(*top_tokens(torch.cat(rows), model.head, SHOWN_TOKENS, tile_bytes))
        return found

    def _backward(
        self, batches: list[MicroBatch], teacher: list[Tensor], student: list[Tensor] | None, kept: Tensor
    ) -> float:
        """Gradients of the *summed* divergence of all kept tokens into `.grad`; returns that sum, nats."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = BACKENDS[self.settings.loss_backend]
        total = 0.0
        for i, (batch, mask) in enumerate(zip(batches, kept.split([b.num_tokens for b in batches]), strict=True)):
            if not mask.any():
                continue
            hidden = student[i] if student else self.pair.student.final_hidden(batch)
            with self.meter.span("loss", allocations=True):
                result = loss(
                    hidden.detach(),
                    teacher[i],
                    mask,
                    self.pair.student.head,
                    self.pair.teacher.head,
                    self.divergence,
                    self.settings.tile_mib * MIB,
                )
            hidden.backward(result.hidden_grad)
            total += float(result.value)
        return total

    def _update(self, loss_sum: float, num_kept: int, step: int) -> dict[str, float]:
        """Turn sums into means per kept token of the whole step (TIP, Eq. 8), clip, and step the optimizer."""
        lr = learning_rate(step, self.settings)
        metrics = {"train/lr": lr, "train/loss": 0.0, "train/grad_norm": 0.0, "train/skipped": float(num_kept == 0)}
        if num_kept == 0:
            return metrics  # nothing to learn from: the weights stay
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(num_kept)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm of step {step} is {norm}; the last checkpoint is from before it"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return metrics | {"train/loss": loss_sum / num_kept, "train/grad_norm": norm}

    def _generator(self, step: int) -> torch.Generator:
        """The selectors' chance is a function of seed and step, so a resumed run draws the same."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)


def learning_rate(step: int, settings: LearnerConfig) -> float:
    """Linear warm-up, then constant, linear or half a cosine to `final_lr_frac` at the last step (steps from 1)."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, settings.num_steps - settings.warmup_steps)
    left = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (settings.final_lr_frac + (1 - settings.final_lr_frac) * left)


def _tokens(batches: list[MicroBatch]) -> Tokens:
    return Tokens(
        rollout=torch.cat([batch.rollout for batch in batches]),
        micro_batch=torch.cat([torch.full_like(batch.rollout, i) for i, batch in enumerate(batches)]),
        position=torch.cat([batch.position for batch in batches]),
    )
