"""One optimizer step: statistics of every response token, selection, masked loss, AdamW.

Two passes over the step's micro-batches: pass 1 measures what the selector needs, without gradient; pass 2 forms the
gradient of the summed divergence of the kept tokens. The sum is divided once, by the number (or total weight) of kept
tokens of the whole step, so any split into micro-batches or ranks gives the same update (TIP, Eq. 8).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tip_exp.config.schema import LearnerConfig
from tip_exp.learner.distributed import Ranks, gather_tokens, response_tokens
from tip_exp.learner.on_policy import mismatch_metrics, sampler_logprobs
from tip_exp.learner.schedule import learning_rate
from tip_exp.learner.teacher import TeacherHidden, split
from tip_exp.losses import BACKENDS
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.estimators import Objective, SampledK1, TopK
from tip_exp.losses.head import LazyLogits
from tip_exp.losses.token_stats import Statistics, TokenStats, normalized_entropy, token_stats
from tip_exp.models.micro_batch import MicroBatch
from tip_exp.models.packed_attention import activation_checkpointing
from tip_exp.models.pair import Pair
from tip_exp.records.meter import Meter
from tip_exp.records.metrics import (
    ENTROPY_NORM_MEAN,
    GRAD_NORM,
    KEPT_FRAC,
    KEPT_TOKENS,
    LOSS,
    LR,
    RESPONSE_TOKENS,
    SKIPPED,
)
from tip_exp.selector.diagnostics import token_metrics
from tip_exp.selector.scores import STATISTICS
from tip_exp.selector.selector import Selection, Selector, Tokens
from tip_exp.types import Rollout
from tip_exp.utils.seeds import seed_for
from tip_exp.utils.units import MIB


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one update did: its metrics, and the numbers of every token, in the order of `tokens`."""

    metrics: dict[str, float]
    tokens: Tokens
    statistics: Statistics
    selection: Selection


class Learner:
    """Holds the optimizer; `step` makes one update of the student from one batch of rollouts."""

    def __init__(self, pair: Pair, selector: Selector, config: LearnerConfig, *, seed: int, meter: Meter) -> None:
        self.pair, self.selector, self.config, self.seed, self.meter = pair, selector, config, seed, meter
        self.ranks = Ranks()
        self.parameters = [p for p in pair.student.module.parameters() if p.requires_grad]
        beta1, beta2 = config.betas
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=(beta1, beta2), weight_decay=config.weight_decay, fused=True
        )
        self._reused_graph: Tensor | None = None

    def step(self, step: int, rollouts: list[Rollout], teacher_hidden: TeacherHidden) -> StepReport:
        """Update number `step` (from 1) on the tokens that the selector keeps.

        `rollouts` are this rank's share of the step, `teacher_hidden` is `Teacher.hidden` of the same rollouts; the
        selector sees the tokens of all ranks.
        """
        batches = split(rollouts, self.pair, self.config)
        with self.meter.span("learner"):
            stats = self._token_stats(batches, teacher_hidden, self._names_at(step, rollouts))
            local = _concatenated(stats)
            mismatch = self._logprob_mismatch(rollouts, batches[: len(stats)], local)
            required = self.required_stats(step)
            statistics = {name: self.ranks.gather(values) for name, values in local.items() if name in required}
            tokens, local_tokens = gather_tokens(self.ranks, batches, len(rollouts))
            generator = torch.Generator().manual_seed(seed_for("select", self.seed, step))
            selection = self.selector(statistics, tokens, generator)
            loss_sum = self._backward(batches, teacher_hidden, stats, selection, local_tokens)
            metrics = self._update(step, loss_sum, selection.mass)
        metrics[KEPT_TOKENS] = float(selection.kept_mask.sum())
        metrics[RESPONSE_TOKENS] = float(len(tokens))
        metrics[KEPT_FRAC] = metrics[KEPT_TOKENS] / max(1, len(tokens))
        metrics |= mismatch | token_metrics(statistics, tokens, selection, self.selector)
        if "entropy" in statistics and len(tokens):
            vocab_size = self.pair.student.head.vocab_size
            metrics[ENTROPY_NORM_MEAN] = float(normalized_entropy(statistics["entropy"], vocab_size).mean())
        return StepReport(metrics, tokens, statistics, selection)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; the student's weights are saved as a model folder."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def required_stats(self, step: int) -> frozenset[str]:
        """Statistics to report and select by: all of them on a diagnostic step, else those the selector reads."""
        every = self.config.diagnostics_every
        return frozenset(STATISTICS) if every and step % every == 0 else self.selector.required_stats

    def _names_at(self, step: int, rollouts: list[Rollout]) -> frozenset[str]:
        """Statistics to measure: the required ones, and what the check against the sampler's log-probs compares."""
        compares = all(rollout.sampler_logprobs for rollout in rollouts)
        return self.required_stats(step) | ({"student_logprob"} if compares else set())

    def _token_stats(
        self, batches: list[MicroBatch], teacher_hidden: TeacherHidden, names: frozenset[str]
    ) -> list[TokenStats]:
        """Pass 1. If only the sampler check needs a statistic, the first (longest) micro-batch suffices."""
        keep_graph = len(batches) == 1  # pass 2 would repeat this very forward pass
        if names <= {"student_logprob"}:
            batches = batches[:1] if names else []
        self._reused_graph = None
        stats = []
        for i, batch in enumerate(batches):
            with torch.set_grad_enabled(keep_graph):
                student_hidden = self._student_hidden(batch)
            if keep_graph:
                self._reused_graph = student_hidden
            with self.meter.span("score", allocations=True):
                batch_stats = token_stats(
                    LazyLogits(student_hidden.detach(), self.pair.student.head),
                    LazyLogits(teacher_hidden[i], self.pair.teacher.head),
                    batch.token_ids,
                    wanted=names,
                    tile_bytes=self.config.tile_mib * MIB,
                    jsd_beta=self.config.jsd_beta,
                )
            stats.append(batch_stats)
        return stats

    def _student_hidden(self, batch: MicroBatch) -> Tensor:
        """(n, D) final hidden states of the student at the batch's response tokens."""
        if self._reused_graph is not None:
            return self._reused_graph
        checkpointed = self.config.activation_checkpointing and torch.is_grad_enabled()
        with activation_checkpointing(self.pair.student.module) if checkpointed else nullcontext():
            return self.pair.student.hidden(batch)

    def _logprob_mismatch(
        self, rollouts: list[Rollout], batches: list[MicroBatch], statistics: Statistics
    ) -> dict[str, float]:
        """Difference of the sampler's and the learner's log-probs of the measured tokens, over all ranks."""
        if "student_logprob" not in statistics or not all(rollout.sampler_logprobs for rollout in rollouts):
            return {}
        tokens, learner = response_tokens(batches), statistics["student_logprob"].double()
        sampler = sampler_logprobs(rollouts, tokens.rollout, tokens.position).to(learner)
        return mismatch_metrics(self.ranks.gather(sampler), self.ranks.gather(learner))

    def _backward(
        self,
        batches: list[MicroBatch],
        teacher_hidden: TeacherHidden,
        stats: list[TokenStats],
        selection: Selection,
        local_tokens: slice,
    ) -> Tensor:
        """Pass 2: add the gradient of the summed divergence of this rank's kept tokens to `.grad`; returns the sum."""
        loss = BACKENDS[self.config.loss_backend]
        total = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)
        stop = local_tokens.start
        for i, batch in enumerate(batches):
            rows = slice(stop, stop := stop + batch.num_tokens)
            kept_mask = selection.kept_mask[rows]
            if not kept_mask.any():
                continue
            student_hidden = self._student_hidden(batch)
            with self.meter.span("loss", allocations=True):
                result = loss(
                    LazyLogits(student_hidden.detach(), self.pair.student.head),
                    LazyLogits(teacher_hidden[i], self.pair.teacher.head),
                    kept_mask,
                    objective(self.config, batch.token_ids),
                    self.config.tile_mib * MIB,
                    log_normalizers=stats[i].log_normalizers if i < len(stats) else None,
                    weights=None if selection.weights is None else selection.weights[rows],
                )
            student_hidden.backward(result.hidden_grad)
            total += result.value
        self._reused_graph = None
        return total

    def _update(self, step: int, loss_sum: Tensor, mass: float) -> dict[str, float]:
        """Divide the summed gradients by the kept tokens' `mass` (TIP, Eq. 8), clip, step the optimizer, free them."""
        lr = learning_rate(step, self.config)
        metrics = {LR: lr, LOSS: 0.0, GRAD_NORM: 0.0, SKIPPED: float(mass == 0)}
        if mass == 0:
            return metrics  # no token was kept: the weights stay
        if self.ranks.size > 1:  # a rank that kept nothing has no gradients, but takes part in the sum
            self.ranks.sum_(p.grad if p.grad is not None else _zero_grad(p) for p in self.parameters)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(mass)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm of step {step} is {norm}; the newest checkpoint is older")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ranks.sum_([loss_sum])
        return metrics | {LOSS: float(loss_sum) / mass, GRAD_NORM: norm}


def objective(config: LearnerConfig, token_ids: Int[Tensor, " n"]) -> Objective:
    """The per-token objective of the loss at response tokens `token_ids`."""
    divergence = Divergence(config.divergence, config.jsd_beta, config.skew)
    if config.estimator == "topk":
        return TopK(divergence, config.topk.k, config.topk.support, config.topk.rest)
    return SampledK1(token_ids) if config.estimator == "sampled_k1" else divergence


def _concatenated(stats: list[TokenStats]) -> Statistics:
    """The statistics of all measured micro-batches, by name."""
    names = sorted(stats[0].values) if stats else []
    return {name: torch.cat([batch.values[name] for batch in stats]) for name in names}


def _zero_grad(parameter: Tensor) -> Tensor:
    parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
