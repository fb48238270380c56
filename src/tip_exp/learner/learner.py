"""One optimizer step: statistics of every response token, selection, masked loss, AdamW.

Two passes over the step's micro-batches: pass 1 measures what the selector needs, without gradient; pass 2 forms the
gradient of the summed, weighted divergence of the kept tokens. The sum is divided once, by the total weight of the kept
tokens of the whole step, so any split into micro-batches or ranks gives the same update (TIP, Eq. 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tip_exp.config.schema import LearnerConfig
from tip_exp.learner.adamw import divide_gradients, make_optimizer, update
from tip_exp.learner.backward import Backward
from tip_exp.learner.data_parallel import StepTokens
from tip_exp.learner.diagnostics import shadow_metrics, token_metrics
from tip_exp.learner.distributed import Ranks
from tip_exp.learner.gradient_signal import gradient_metrics
from tip_exp.learner.objective import make_objective, objective_stats
from tip_exp.learner.on_policy import measured_mismatch
from tip_exp.learner.schedule import is_due, learning_rate
from tip_exp.learner.selectors import draws
from tip_exp.learner.teacher import TeacherHidden, split
from tip_exp.losses.head import LazyLogits
from tip_exp.losses.online_softmax import LogNormalizers
from tip_exp.losses.token_stats import Statistics, TokenStats, token_stats
from tip_exp.models.micro_batch import MicroBatch
from tip_exp.models.pair import Pair
from tip_exp.records import metrics as names
from tip_exp.records.meter import Meter
from tip_exp.selector.scores import DIAGNOSTICS, RuleError, RuleIsNaN
from tip_exp.selector.selector import Selection, Selector, Tokens
from tip_exp.types import Rollout
from tip_exp.utils.errors import RunFailedError, is_out_of_memory
from tip_exp.utils.units import MIB

MAX_NON_FINITE = 5  # steps in a row that learner.non_finite=skip leaves out
MAX_WITHOUT_TOKENS = 5  # steps at the start of a run in which a selector may keep no token


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one update did: its metrics, and the numbers of every token, in the order of `tokens`."""

    metrics: dict[str, float]
    tokens: Tokens
    statistics: Statistics
    selection: Selection


@dataclass(frozen=True, slots=True)
class _Measured:
    """What pass 1 leaves to the rest of a step."""

    share: StepTokens
    statistics: Statistics  # of all ranks' tokens, on the host
    log_normalizers: list[LogNormalizers | None]  # of this rank's micro-batches
    mismatch: dict[str, float]  # of the sampler's log-probabilities; {} if it gave none


class Learner:
    """Holds the optimizer; `step` makes one update of the student from one batch of rollouts."""

    def __init__(
        self,
        pair: Pair,
        selector: Selector,
        config: LearnerConfig,
        *,
        seed: int,
        meter: Meter,
        shadows: dict[str, Selector] | None = None,
        keep_batch: Callable[[int, list[Rollout], str], None] = lambda *_: None,
    ) -> None:
        """`keep_batch` gets a step whose numbers are not finite: its number, its rollouts and what is not finite.

        `shadows`: name -> rule that is scored at the steps with diagnostics and trains nothing.
        """
        self.pair, self.selector, self.config, self.seed, self.meter = pair, selector, config, seed, meter
        self.keep_batch, self._num_non_finite, self.shadows = keep_batch, 0, shadows or {}
        self._order_tokens = config.micro_batch_tokens  # as configured: orders the tokens if `config`'s is lowered
        self.ranks = Ranks()
        assert self.ranks.size == 1 or pair.student.shards is not None, "gradients are summed by the shards"
        self.parameters = [p for p in pair.student.module.parameters() if p.requires_grad]
        self.optimizer, self.backward = make_optimizer(self.parameters, config), Backward.of(config)

    def step(self, step: int, rollouts: list[Rollout], teacher_hidden: TeacherHidden) -> StepReport:
        """Update number `step` (from 1) on the tokens that the selector keeps.

        `rollouts` are the whole step's, the same on every rank; `teacher_hidden` is `Teacher.hidden` of them, this
        rank's share. The selector sees the tokens of all ranks, so every rank makes the same selection.

        Raises FloatingPointError if a number that decides the update is not finite and learner.non_finite is stop,
        RunFailedError if no token was kept in the first MAX_WITHOUT_TOKENS steps.
        """
        batches, num_non_finite = split(rollouts, self.pair, self.config, self.ranks), self._num_non_finite
        student, teacher = self.pair.student, self.pair.teacher
        required = self.selector.required_stats | objective_stats(self.config)
        shadows: dict[str, Selector] = {}
        if is_due(step, self.config.diagnostics_every):
            shadows = self.shadows
            required |= DIAGNOSTICS.union(*(shadow.required_stats for shadow in shadows.values()))
        with self.meter.span("learner"):
            with student.whole(trains=True), teacher.whole():
                measured, graph = self._measure(rollouts, batches, teacher_hidden, required)  # pass 1
                share, statistics = measured.share, measured.statistics
                selection = self._select(step, rollouts, statistics, share.tokens)
                objective_of = make_objective(self.config, statistics)
                loss_sum = self.backward(  # pass 2
                    student,
                    teacher.head,
                    batches,
                    teacher_hidden,
                    selection.at(share.rows),
                    objective_of,
                    reused_graph=graph,
                    log_normalizers=measured.log_normalizers,
                    span=partial(self.meter.span, "loss", allocations=True),
                )
                del graph  # of the activations, before the passes that follow
                signal: dict[str, float] = {}
                if is_due(step, self.config.gradient_every) and selection.mass:
                    with self.meter.span("gradients"):
                        signal = gradient_metrics(
                            self.pair,
                            self.config,
                            rollouts,
                            batches,
                            teacher_hidden,
                            share,
                            selection,
                            objective_of,
                            self.optimizer,
                        )
            # Before the update: if memory does not suffice for them, the step can be done again.
            vocab_size, draws_of = student.loaded_head.vocab_size, partial(draws, self.seed, step)
            described = token_metrics(statistics, share.tokens, selection, self.selector, vocab_size)
            described |= shadow_metrics(shadows, statistics, share.tokens, selection.kept_mask, draws_of)
            metrics = self._update(step, rollouts, loss_sum, selection.mass)
        if self._num_non_finite > num_non_finite:
            metrics[names.NON_FINITE] = 1.0
        else:
            self._num_non_finite = 0
            metrics |= measured.mismatch | signal
            if selection.mass == 0 and step >= MAX_WITHOUT_TOKENS and not self.optimizer.state:
                raise RunFailedError(
                    f"step {step}: the selector has kept no token so far, so that nothing is trained; change "
                    f"selector.retention (here {self.selector.retention:g}), selector.rounding (here "
                    f"{self.selector.rounding}) or selector.parameters"
                )
        return StepReport(metrics | described, share.tokens, statistics, selection)

    def _measure(
        self,
        rollouts: list[Rollout],
        batches: list[MicroBatch],
        teacher_hidden: TeacherHidden,
        required: frozenset[str],
    ) -> tuple[_Measured, Tensor | None]:
        """The statistics `required` of all ranks' tokens, and the graph that `token_stats` keeps of one micro-batch."""
        checks_sampler = all(rollout.sampler_logprobs for rollout in rollouts)
        wanted = required | {"student_logprob"} if checks_sampler else required
        # If only the sampler check needs a statistic, the first (longest) micro-batch suffices.
        scored = batches if required else batches[:1] if wanted else []
        stats, graph = self.token_stats(scored, teacher_hidden, wanted, keep_graph=len(batches) == 1)
        # To the host once: the selection and its metrics would wait for the device at every number.
        of_rank = {name: torch.cat([s.values[name] for s in stats]).cpu() for name in sorted(wanted)}
        share = StepTokens.of(
            rollouts,
            self.ranks,
            packing=self.config.packing,
            budget=self._order_tokens,
            computed=self.config.micro_batch_tokens,
        )
        gather = partial(self.ranks.gather, counts=share.counts)
        statistics = {name: share.in_order(gather(of_rank[name])) for name in sorted(required)}
        mismatch: dict[str, float] = {}
        if checks_sampler:
            logprobs = of_rank["student_logprob"]
            mismatch = measured_mismatch(rollouts, share, self.ranks, logprobs, self.pair.stop_class)
        return _Measured(share, statistics, [s.log_normalizers for s in stats], mismatch), graph

    def _select(self, step: int, rollouts: list[Rollout], statistics: Statistics, tokens: Tokens) -> Selection:
        """What the selector keeps, with the weights of `learner.average`; nothing if a number is not finite."""
        try:
            selection = self.selector(statistics, tokens, draws(self.seed, step))
        except RuleError as error:
            if (cause := error.__cause__) is not None and is_out_of_memory(cause):
                raise cause from None
            raise
        except FloatingPointError as error:
            self._reject(step, rollouts, str(error), can_replay=not isinstance(error, RuleIsNaN))
            selection = Selection(torch.zeros(len(tokens), dtype=torch.bool), torch.zeros(len(tokens)))
        return selection.averaged(tokens, self.config.average)

    def token_stats(
        self, batches: list[MicroBatch], teacher_hidden: TeacherHidden, wanted: frozenset[str], *, keep_graph: bool
    ) -> tuple[list[TokenStats], Tensor | None]:
        """The statistics of micro-batches; with `keep_graph` also the hidden states of the only one, with their graph.

        Pass 2 reuses that graph.
        """
        stats: list[TokenStats] = []
        graph: Tensor | None = None
        for i, batch in enumerate(batches):
            with torch.set_grad_enabled(keep_graph):
                student_hidden = self.backward.student_hidden(self.pair.student, batch)
            if keep_graph:
                graph = student_hidden
            with self.meter.span("score", allocations=True):
                batch_stats = token_stats(
                    LazyLogits(student_hidden.detach(), self.pair.student.head),
                    LazyLogits(teacher_hidden[i], self.pair.teacher.head),
                    batch.token_ids,
                    wanted=wanted,
                    tile_bytes=self.config.tile_mib * MIB,
                    jsd_beta=self.config.jsd_beta,
                )
            stats.append(batch_stats)
        return stats, graph

    def _update(self, step: int, rollouts: list[Rollout], loss_sum: Tensor, mass: float) -> dict[str, float]:
        """Divide the summed gradients by the kept tokens' `mass` (TIP, Eq. 8), clip, step the optimizer, free them."""
        lr = learning_rate(step, self.config)
        if mass == 0:  # no token was kept: the weights stay
            self.optimizer.zero_grad()
            return {names.LR: lr, names.SKIPPED: 1.0}
        total_norm = divide_gradients(self.parameters, mass)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, total_norm)
        self.ranks.sum_([loss_sum])
        norm, loss = float(total_norm), float(loss_sum) / mass
        if not (math.isfinite(norm) and math.isfinite(loss)):
            self._reject(step, rollouts, f"the gradient norm is {norm}, the loss {loss}")
            self.optimizer.zero_grad()
            return {names.LR: lr, names.SKIPPED: 1.0}
        try:
            ratio = update(self.optimizer, lr, self.ranks)
        except FloatingPointError as error:
            self.keep_batch(step, rollouts, str(error))
            raise FloatingPointError(
                f"step {step}, learner.lr={self.config.lr:g}: {error}. The newest checkpoint is older"
            ) from error
        return {
            names.LR: lr, names.LOSS: loss, names.GRAD_NORM: norm, names.UPDATE_RATIO: ratio, names.SKIPPED: 0.0,
        }  # fmt: skip

    def _reject(self, step: int, rollouts: list[Rollout], fault: str, *, can_replay: bool = True) -> None:
        """Keep the batch; raise FloatingPointError unless the step may be skipped."""
        self.keep_batch(step, rollouts, fault)
        self._num_non_finite += 1
        if self.config.non_finite == "stop" or self._num_non_finite > MAX_NON_FINITE:
            replay = "; `tip-exp replay FOLDER` shows where" if can_replay else ""
            raise FloatingPointError(
                f"step {step}: {fault}. Its rollouts are in non_finite_{step:05d}.json{replay}. "
                f"learner.non_finite={self.config.non_finite}; skip leaves out at most {MAX_NON_FINITE} such steps in "
                "a row"
            )

    def discard(self) -> bool:
        """Drop what a step that failed before its update has left; False if the model cannot be used again."""
        shards = self.pair.student.shards
        usable = shards is None or shards.reset()
        self.optimizer.zero_grad()
        return usable
