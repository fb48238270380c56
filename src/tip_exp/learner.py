"""The PyTorch side of a step: hidden states -> statistics -> selection -> masked loss -> AdamW."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tip_exp.backbone import enable_packing
from tip_exp.batching import MicroBatch, micro_batches, without_tails
from tip_exp.config import LearnerConfig
from tip_exp.diagnostics import token_metrics
from tip_exp.divergence import Divergence
from tip_exp.estimators import Objective, SampledK1, TopK
from tip_exp.loss import BACKENDS
from tip_exp.meter import MIB, Meter
from tip_exp.models import Pair
from tip_exp.privileged import aligned
from tip_exp.ranks import Ranks
from tip_exp.rollout.proof import gap_metrics, sampler_logprobs
from tip_exp.rollout.types import Rollout
from tip_exp.scores import STATISTICS
from tip_exp.scoring import Scored, Statistics, measure, normalized_entropy, top_tokens
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
        self.ranks = Ranks()
        self.parameters = [p for p in pair.student.module.parameters() if p.requires_grad]
        if settings.packing:
            enable_packing(pair.teacher.module)
            enable_packing(pair.student.module)
        beta1, beta2 = settings.betas
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.lr, betas=(beta1, beta2), weight_decay=settings.weight_decay, fused=True
        )

    def step(
        self, rollouts: list[Rollout], step: int, *, show: int = 0, teacher_reads: list[Rollout] | None = None
    ) -> StepReport:
        """One optimizer step, number `step` (from 1), on the tokens the selector keeps.

        `rollouts` are this rank's share of the step; the selector sees the tokens of all ranks. Of the first `show`
        rollouts the report says what both models would have written, before the update. `teacher_reads`: the same
        responses behind other prompts, where the teacher's differ.
        """
        device = self.pair.student.module.device
        budget, packing = self.settings.micro_batch_tokens, self.settings.packing
        batches = [b.to(device) for b in micro_batches(rollouts, budget, self.pair.pad_id, packing=packing)]
        with self.meter.span("teacher"), torch.no_grad():
            teacher_hidden = self._teacher_hidden(batches, teacher_reads)
        with self.meter.span("learner"):
            wanted = self._wanted(step)
            # With one micro-batch its graph is kept from here to the loss, else each is run again with gradient.
            keep_graph = len(batches) == 1
            student_hidden: list[Tensor] = []
            if keep_graph or wanted or show:
                with torch.set_grad_enabled(keep_graph):
                    student_hidden = [self._student_hidden(batch) for batch in batches]
            proving = all(rollout.sampler_logprobs for rollout in rollouts)
            # Where rows of log-probs are formed anyway, the sampled token's is one more gather.
            measured = wanted | {"student_logprob"} if wanted and proving else wanted
            with self.meter.span("score", allocations=True):
                scored = self._score(batches, student_hidden, teacher_hidden, measured)
            likeliest = self._likeliest(batches, student_hidden, teacher_hidden, show)
            own = {name: torch.cat([one.statistics[name] for one in scored]) for name in sorted(measured)}
            gap = self._sampler_gap(rollouts, batches, student_hidden, own) if proving else {}
            statistics = {name: self.ranks.gather(values) for name, values in own.items() if name in wanted}
            tokens, mine = self._everyones_tokens(batches, len(rollouts))
            selection = self.selector(statistics, tokens, self._generator(step))
            student = student_hidden if keep_graph else None
            weights = None if selection.weights is None else selection.weights[mine]
            loss_sum, cut = self._backward(
                rollouts, batches, teacher_hidden, student, scored, selection.kept[mine], weights
            )
            metrics = self._update(loss_sum, selection.mass, step)
        metrics["learner/tail_cut_frac"] = cut
        metrics["select/kept_tokens"] = float(selection.kept.sum())
        metrics["select/response_tokens"] = float(len(tokens))
        metrics["select/kept_frac"] = metrics["select/kept_tokens"] / max(1, len(tokens))
        metrics |= gap | token_metrics(statistics, tokens, selection, self.selector)
        if "entropy" in statistics and len(tokens):
            width = self.pair.student.head.vocab_size
            metrics["score/entropy_norm_mean"] = float(normalized_entropy(statistics["entropy"], width).mean())
        return StepReport(metrics, tokens, statistics, selection, likeliest)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's; the weights are the student's own folder."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def _teacher_hidden(self, batches: list[MicroBatch], reads: list[Rollout] | None) -> list[Tensor]:
        """Hidden states of the teacher at the tokens of the student's batches, whatever stands before the responses."""
        if reads is None:
            return [self.pair.teacher.final_hidden(batch) for batch in batches]
        device, budget = self.pair.teacher.module.device, self.settings.micro_batch_tokens
        own = micro_batches(reads, budget, self.pair.pad_id, packing=self.settings.packing)
        own = [batch.to(device) for batch in own]
        return aligned(batches, own, [self.pair.teacher.final_hidden(batch) for batch in own])

    def _wanted(self, step: int) -> frozenset[str]:
        """Statistics to measure: all on a diagnostic step, else what the selector reads."""
        every = self.settings.diagnostics_every
        return frozenset(STATISTICS) if every and step % every == 0 else self.selector.reads

    def _score(
        self, batches: list[MicroBatch], student: list[Tensor], teacher: list[Tensor], wanted: frozenset[str]
    ) -> list[Scored]:
        if not wanted:
            return []
        return [
            measure(
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

    def _sampler_gap(
        self, rollouts: list[Rollout], batches: list[MicroBatch], student: list[Tensor], statistics: Statistics
    ) -> dict[str, float]:
        """How far sampler and learner are apart on all tokens; if nothing was scored, on the first micro-batch's.

        The first holds the longest rollouts, where errors had the most time to grow.
        """
        proven = batches if "student_logprob" in statistics else batches[:1]
        tokens = _tokens(proven)
        if "student_logprob" not in statistics:
            with torch.no_grad():
                hidden = student[:1] or [self._student_hidden(batches[0])]
            (scored,) = self._score(proven, hidden, hidden, frozenset({"student_logprob"}))  # reads no teacher
            statistics = scored.statistics
        sampled = sampler_logprobs(rollouts, tokens.rollout, tokens.position)
        learned = statistics["student_logprob"].double()
        # Over all ranks, so that they stop together.
        return gap_metrics(self.ranks.gather(sampled.to(learned)), self.ranks.gather(learned))

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

    def _student_hidden(self, batch: MicroBatch) -> Tensor:
        return self.pair.student.final_hidden(batch, checkpointing=self.settings.activation_checkpointing)

    def _backward(
        self,
        rollouts: list[Rollout],
        batches: list[MicroBatch],
        teacher: list[Tensor],
        student: list[Tensor] | None,
        scored: list[Scored],
        kept: Tensor,
        weights: Tensor | None,
    ) -> tuple[float, float]:
        """Gradients of the *summed* (weighted) divergence of kept tokens into `.grad`; returns that sum, nats.

        Without hidden states of the student that hold a graph they are computed here, less each sequence's tail behind
        its last kept token; the second figure is the share of the backbone's tokens that this saved.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = BACKENDS[self.settings.loss_backend]
        sizes = [batch.num_tokens for batch in batches]
        shares = [None] * len(sizes) if weights is None else weights.split(sizes)
        total, computed = 0.0, 0
        for i, (batch, mask, share) in enumerate(zip(batches, kept.split(sizes), shares, strict=True)):
            hidden, left = None, slice(None)
            if student:
                hidden = student[i]
                computed += batch.input_ids.numel()
            elif shorter := without_tails(batch, rollouts, mask, self.pair.pad_id):
                batch, left = shorter
                hidden = self._student_hidden(batch)
                computed += batch.input_ids.numel()
            if hidden is None or not mask.any():
                continue
            known = scored[i].normalizers if scored else None
            with self.meter.span("loss", allocations=True):
                result = loss(
                    hidden.detach(),
                    teacher[i][left],
                    mask[left],
                    self.pair.student.head,
                    self.pair.teacher.head,
                    objective(self.settings, batch.token_ids),
                    self.settings.tile_mib * MIB,
                    normalizers=None if known is None else known[left],
                    weights=None if share is None else share[left],
                )
            hidden.backward(result.hidden_grad)
            total += float(result.value)
        return total, 1 - computed / sum(batch.input_ids.numel() for batch in batches)

    def _update(self, loss_sum: float, mass: float, step: int) -> dict[str, float]:
        """Turn sums into means over the kept tokens of the whole step (TIP, Eq. 8), clip, and step the optimizer."""
        lr = learning_rate(step, self.settings)
        metrics = {"train/lr": lr, "train/loss": 0.0, "train/grad_norm": 0.0, "train/skipped": float(mass == 0)}
        if mass == 0:
            return metrics  # nothing to learn from: the weights stay
        if self.ranks.size > 1:  # a rank that kept nothing has no gradients, but must join in their sum
            self.ranks.sum_(p.grad if p.grad is not None else _zero_grad(p) for p in self.parameters)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(mass)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm of step {step} is {norm}; the last checkpoint is from before it"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        everyones = torch.tensor(loss_sum, dtype=torch.float64, device=self.parameters[0].device)
        self.ranks.sum_([everyones])
        return metrics | {"train/loss": float(everyones) / mass, "train/grad_norm": norm}

    def _everyones_tokens(self, batches: list[MicroBatch], num_rollouts: int) -> tuple[Tokens, slice]:
        """Tokens of all ranks, numbered as one process would number them, and where this rank's are among them."""
        tokens, device, rank = _tokens(batches), self.parameters[0].device, self.ranks.rank
        first_rollout = sum(self.ranks.counts(num_rollouts, device)[:rank])
        first_batch = sum(self.ranks.counts(len(batches), device)[:rank])
        first_token = sum(self.ranks.counts(len(tokens), device)[:rank])
        everyones = Tokens(
            rollout=self.ranks.gather(tokens.rollout + first_rollout),
            micro_batch=self.ranks.gather(tokens.micro_batch + first_batch),
            position=self.ranks.gather(tokens.position),
        )
        return everyones, slice(first_token, first_token + len(tokens))

    def _generator(self, step: int) -> torch.Generator:
        """The selectors' chance is a function of seed and step, so a resumed run draws the same."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)


def objective(settings: LearnerConfig, token_ids: Tensor) -> Objective:
    """What is minimised at the response tokens `token_ids`, (N,)."""
    divergence = Divergence(settings.divergence, settings.jsd_beta, settings.skew)
    if settings.estimator == "topk":
        return TopK(divergence, settings.topk.k, settings.topk.support, settings.topk.rest)
    return SampledK1(token_ids) if settings.estimator == "sampled_k1" else divergence


def learning_rate(step: int, settings: LearnerConfig) -> float:
    """Linear warm-up, then constant, linear or half a cosine to `final_lr_frac` at the last step (steps from 1)."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, settings.num_steps - settings.warmup_steps)
    left = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (settings.final_lr_frac + (1 - settings.final_lr_frac) * left)


def _zero_grad(parameter: Tensor) -> Tensor:
    parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _tokens(batches: list[MicroBatch]) -> Tokens:
    return Tokens(
        rollout=torch.cat([batch.rollout for batch in batches]),
        micro_batch=torch.cat([torch.full_like(batch.rollout, i) for i, batch in enumerate(batches)]),
        position=torch.cat([batch.position for batch in batches]),
    )
