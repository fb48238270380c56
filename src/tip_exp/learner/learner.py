"""The PyTorch side of a step: hidden states -> statistics -> selection -> masked loss -> AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tip_exp.config.schema import LearnerConfig
from tip_exp.learner.distributed import Ranks
from tip_exp.learner.on_policy import mismatch_metrics, sampler_logprobs
from tip_exp.learner.schedule import learning_rate
from tip_exp.learner.teacher_cache import TeacherCache
from tip_exp.losses import BACKENDS
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.estimators import Objective, SampledK1, TopK
from tip_exp.losses.token_stats import Scored, Statistics, measure, normalized_entropy, top_tokens
from tip_exp.models.micro_batch import MicroBatch, cut, micro_batches
from tip_exp.models.packed_attention import activation_checkpointing
from tip_exp.models.pair import Pair
from tip_exp.models.privileged import aligned
from tip_exp.models.teacher_offload import TeacherOffloader
from tip_exp.records.meter import Meter
from tip_exp.selector.diagnostics import token_metrics
from tip_exp.selector.scores import STATISTICS
from tip_exp.selector.selector import Selection, Selector, Tokens
from tip_exp.types import Rollout
from tip_exp.utils.units import MIB

SHOWN_TOKENS = 5  # of each model, at each position that is shown
# A graph that scoring has recorded costs a backward of twice the forward's work; a cut batch is run again for three
# times its part of it. Below 2/3 that is less; a hair below, for what is left is not always the cheaper part.
RUN_AGAIN_BELOW = 0.6


@dataclass(frozen=True, slots=True)
class TopTokens:
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
    likeliest: dict[str, TopTokens]


@dataclass(frozen=True, slots=True)
class _Backward:
    """`value`: the summed divergence, nats. `num_cut`: places of the backbone that no gradient went through."""

    value: float
    num_cut: int


class Learner:
    """Holds the optimizer; `step` makes one update from one batch of rollouts."""

    def __init__(
        self,
        pair: Pair,
        selector: Selector,
        settings: LearnerConfig,
        *,
        seed: int,
        meter: Meter,
        scratch: Path | None = None,
    ) -> None:
        """`scratch`: where hidden states go that memory does not take; None: the system's folder for such files."""
        self.pair, self.selector, self.settings, self.seed, self.meter = pair, selector, settings, seed, meter
        self.ranks, self.scratch = Ranks(), scratch
        device, teacher = pair.student.module.device, pair.teacher
        self.teacher = TeacherOffloader(teacher.module, teacher.head, pair.placement, device, pair.reload_teacher)
        self.parameters = [p for p in pair.student.module.parameters() if p.requires_grad]
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
        self.optimizer.zero_grad(set_to_none=True)  # before the teacher comes
        batches = self._micro_batches(rollouts)
        with self.meter.span("teacher"), torch.no_grad():
            teacher_hidden = self._teacher_hidden(batches, teacher_reads)
        with self.meter.span("learner"):
            wanted = self._wanted(step)
            # With one micro-batch its graph is kept from here to the loss, else each is run again with gradient.
            keep_graph = len(batches) == 1
            student_hidden: list[Tensor] = []
            if keep_graph or wanted or show:
                with torch.set_grad_enabled(keep_graph):
                    student_hidden = [self._student(batch) for batch in batches]
            proving = all(rollout.sampler_logprobs for rollout in rollouts)
            # Where rows of log-probs are formed anyway, the sampled token's is one more gather.
            measured = wanted | {"student_logprob"} if wanted and proving else wanted
            with self.meter.span("score", allocations=True):
                scored = self._score(batches, student_hidden, teacher_hidden, measured)
            likeliest = self._likeliest(batches, student_hidden, teacher_hidden, show)
            own = {name: torch.cat([one.statistics[name] for one in scored]) for name in sorted(measured)}
            gap = self._logprob_mismatch(rollouts, batches, student_hidden, own) if proving else {}
            statistics = {name: self.ranks.gather(values) for name, values in own.items() if name in wanted}
            tokens, mine = self._everyones_tokens(batches, len(rollouts))
            selection = self.selector(statistics, tokens, self._generator(step))
            if not keep_graph:
                student_hidden = []
            backward = self._backward(batches, teacher_hidden, student_hidden, scored, selection, mine)
            metrics = self._update(backward.value, selection.mass, step)
        metrics["select/kept_tokens"] = float(selection.kept.sum())
        metrics["select/response_tokens"] = float(len(tokens))
        metrics["select/kept_frac"] = metrics["select/kept_tokens"] / max(1, len(tokens))
        metrics["train/backbone_cut_frac"] = self._everyones_share(backward.num_cut, batches)
        metrics |= teacher_hidden.metrics(self.pair.teacher.head.vocab_size)
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

    def _micro_batches(self, rollouts: list[Rollout]) -> list[MicroBatch]:
        settings, device = self.settings, self.pair.student.module.device
        made = micro_batches(rollouts, settings.micro_batch_tokens, self.pair.pad_id, packing=settings.packing)
        return [batch.to(device) for batch in made]

    def _teacher_hidden(self, batches: list[MicroBatch], reads: list[Rollout] | None) -> TeacherCache:
        """Hidden states of the teacher at the tokens of the student's batches, whatever stands before the responses."""
        found = TeacherCache(2**62, self.scratch)
        with self.teacher.on_device(self._students):
            if reads is None:
                for batch in batches:
                    found.append(self.pair.teacher.final_hidden(batch))
            else:
                own = self._micro_batches(reads)
                for hidden in aligned(batches, own, [self.pair.teacher.final_hidden(batch) for batch in own]):
                    found.append(hidden)
        return found

    def _student(self, batch: MicroBatch) -> Tensor:
        """The student's hidden states, with the graph that the settings ask for if one is recorded."""
        recomputed = self.settings.activation_checkpointing and torch.is_grad_enabled()
        with activation_checkpointing(self.pair.student.module) if recomputed else nullcontext():
            return self.pair.student.final_hidden(batch)

    def _students(self) -> Iterator[Tensor]:
        """All that the student has on the device between steps."""
        yield from self.pair.student.module.parameters()
        yield from self.pair.student.module.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def _everyones_share(self, num_cut: int, batches: list[MicroBatch]) -> float:
        """Places that no gradient went through, over all that there are, of all ranks."""
        counts = torch.tensor([num_cut, sum(b.num_places for b in batches)], dtype=torch.float64)
        counts = counts.to(self.parameters[0].device)
        self.ranks.sum_([counts])
        return float(counts[0] / counts[1])

    def _wanted(self, step: int) -> frozenset[str]:
        """Statistics to measure: all on a diagnostic step, else what the selector reads."""
        every = self.settings.diagnostics_every
        return frozenset(STATISTICS) if every and step % every == 0 else self.selector.reads

    def _score(
        self, batches: list[MicroBatch], student: list[Tensor], teacher: Iterable[Tensor], wanted: frozenset[str]
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

    def _logprob_mismatch(
        self, rollouts: list[Rollout], batches: list[MicroBatch], student: list[Tensor], statistics: Statistics
    ) -> dict[str, float]:
        """How far sampler and learner are apart on all tokens; if nothing was scored, on the first micro-batch's.

        The first holds the longest rollouts, where errors had the most time to grow.
        """
        proven = batches if "student_logprob" in statistics else batches[:1]
        tokens = _tokens(proven)
        if "student_logprob" not in statistics:
            with torch.no_grad():
                hidden = student[:1] or [self._student(batches[0])]
            (scored,) = self._score(proven, hidden, hidden, frozenset({"student_logprob"}))  # reads no teacher
            statistics = scored.statistics
        sampled = sampler_logprobs(rollouts, tokens.rollout, tokens.position)
        learned = statistics["student_logprob"].double()
        # Over all ranks, so that they stop together.
        return mismatch_metrics(self.ranks.gather(sampled.to(learned)), self.ranks.gather(learned))

    def _likeliest(
        self, batches: list[MicroBatch], student: list[Tensor], teacher: Iterable[Tensor], show: int
    ) -> dict[str, TopTokens]:
        if not show:
            return {}
        found: dict[str, TopTokens] = {}
        for name, model, hidden in (
            ("student", self.pair.student, student),
            ("teacher", self.pair.teacher, teacher),
        ):
            rows = [one.detach()[batch.rollout < show] for batch, one in zip(batches, hidden, strict=True)]
            tile_bytes = self.settings.tile_mib * MIB
            found[name] = TopTokens(*top_tokens(torch.cat(rows), model.head, SHOWN_TOKENS, tile_bytes))
        return found

    def _backward(
        self,
        batches: list[MicroBatch],
        teacher: TeacherCache,
        graphs: list[Tensor],
        scored: list[Scored],
        selection: Selection,
        mine: slice,
    ) -> _Backward:
        """Gradients of the *summed* (weighted) divergence of kept tokens into `.grad`.

        `graphs`: student's hidden states with their graph, or none; emptied where a cut batch is run again instead.
        `mine`: which of the selection's tokens the batches hold.
        """
        loss = BACKENDS[self.settings.loss_backend]
        total, num_cut, start = 0.0, 0, mine.start
        for i, batch in enumerate(batches):
            own = slice(start, start + batch.num_tokens)
            start, kept = own.stop, selection.kept[own]
            weights = None if selection.weights is None else selection.weights[own]
            normalizers = scored[i].normalizers if scored else None
            other = teacher[i]
            if not kept.any():
                num_cut += batch.num_places
                continue
            # `materialized` stands for whole logits of every token, so there nothing is cut.
            part = cut(batch, kept) if self.settings.loss_backend == "fused" else batch
            if graphs and part.num_places > RUN_AGAIN_BELOW * batch.num_places:
                part, hidden = batch, graphs[i]
            else:
                graphs.clear()
                hidden = self._student(part)
            if part is not batch:
                num_cut += batch.num_places - part.num_places
                other, weights = other[kept], None if weights is None else weights[kept]
                normalizers = None if normalizers is None else normalizers[kept]
                kept = torch.ones_like(part.token_ids, dtype=torch.bool)
            with self.meter.span("loss", allocations=True):
                result = loss(
                    hidden.detach(),
                    other,
                    kept,
                    self.pair.student.head,
                    self.pair.teacher.head,
                    objective(self.settings, part.token_ids),
                    self.settings.tile_mib * MIB,
                    normalizers=normalizers,
                    weights=weights,
                )
            hidden.backward(result.hidden_grad)
            total += float(result.value)
        return _Backward(total, num_cut)

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


def objective(settings: LearnerConfig, token_ids: Int[Tensor, " n"]) -> Objective:
    """What a run minimises at the response tokens `token_ids`."""
    divergence = Divergence(settings.divergence, settings.jsd_beta, settings.skew)
    if settings.estimator == "topk":
        return TopK(divergence, settings.topk.k, settings.topk.support, settings.topk.rest)
    return SampledK1(token_ids) if settings.estimator == "sampled_k1" else divergence


def _zero_grad(parameter: Tensor) -> Tensor:
    parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _tokens(batches: list[MicroBatch]) -> Tokens:
    return Tokens(
        rollout=torch.cat([batch.rollout for batch in batches]),
        micro_batch=torch.cat([torch.full_like(batch.rollout, i) for i, batch in enumerate(batches)]),
        position=torch.cat([batch.position for batch in batches]),
    )
