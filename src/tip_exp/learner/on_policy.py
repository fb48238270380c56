"""Check that rollouts are on-policy: log-probs of the sampled tokens by the sampler against those by the learner.

The learner scores the sampled tokens before it updates, so equal weights give equal log-probs up to rounding. Stale
weights or a layer loaded wrongly do not. With rollout.staleness=1 the weights are equal at step 1 alone: afterwards the
differences also hold one update, and only limits that the config gives apply. An evaluation without training compares
some responses of its own.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tip_exp.config.schema import LearnerConfig
from tip_exp.learner.data_parallel import StepTokens
from tip_exp.learner.distributed import ALONE, Ranks
from tip_exp.learner.teacher import split
from tip_exp.losses.head import LazyLogits
from tip_exp.losses.token_stats import token_stats
from tip_exp.models.pair import Model, Pair
from tip_exp.records.metrics import MISMATCH_MAX, MISMATCH_MEAN, MISMATCH_P999
from tip_exp.types import Rollout
from tip_exp.utils.units import MIB

log = logging.getLogger(__name__)


class SyncError(RuntimeError):
    """The sampler's weights are not the learner's."""


@dataclass(frozen=True, slots=True)
class MismatchLimits:
    """Largest |difference of log-probs| that rounding explains, nats: mean, 99.9th percentile and maximum of a step."""

    mean: float
    p999: float
    max: float


# float32: measured on CPUs a hundred times below; TF32 on GPUs needs the margin. Half precision: reported for models of
# 1 to 30 B parameters, where single improbable tokens differ by more than 1 nat.
LIMITS = {
    "float32": MismatchLimits(5e-4, 0.01, 0.02),
    "float16": MismatchLimits(0.01, 0.15, 0.5),
    "bfloat16": MismatchLimits(0.06, 1.0, 4.0),
}

UNLIMITED = MismatchLimits(math.inf, math.inf, math.inf)


def limits_for(*dtypes: str, **given: float | None) -> MismatchLimits:
    """The `given` limits by name; where None, those of the coarsest dtype that sampler or learner computes in.

    Without a dtype only the given limits apply: different weights differ by more than rounding.
    """
    coarsest = max((LIMITS[dtype] for dtype in dtypes), key=lambda limits: limits.mean, default=UNLIMITED)
    return replace(coarsest, **{name: limit for name, limit in given.items() if limit is not None})


def sampler_logprobs(
    rollouts: list[Rollout], rollout: Int[Tensor, " n"], position: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Log-probs (nats) that the sampler gave to the tokens at `position` of the responses numbered `rollout`."""
    indices = zip(rollout.tolist(), position.tolist(), strict=True)
    return torch.tensor([rollouts[i].sampler_logprobs[n] for i, n in indices], dtype=torch.float64)


def measured_mismatch(
    rollouts: list[Rollout],
    share: StepTokens,
    ranks: Ranks,
    learner: Float[Tensor, " n"],
    stop_class: tuple[int, ...],
) -> dict[str, float]:
    """Mismatch of the first len(learner) tokens of each rank's share; `learner`: this rank's log-probs, nats."""
    rollout, position = (values[share.rows][: len(learner)] for values in (share.tokens.rollout, share.tokens.position))
    rows = single_tokens(rollouts, rollout, position, stop_class)
    learner = learner[rows].double()
    sampler = sampler_logprobs(rollouts, rollout[rows], position[rows]).to(learner)
    return mismatch_metrics(ranks.gather(sampler), ranks.gather(learner))


@torch.no_grad()
def model_mismatch(model: Model, rollouts: list[Rollout], pair: Pair, config: LearnerConfig) -> dict[str, float]:
    """Mismatch of rollouts by an engine that should have the weights of `model`; every rank reads all of them."""
    sampler: list[Tensor] = []
    learner: list[Tensor] = []
    with model.whole():
        for batch in split(rollouts, pair, config, ALONE):
            logits, wanted = LazyLogits(model.hidden(batch), model.head), frozenset({"student_logprob"})
            stats = token_stats(logits, logits, batch.token_ids, wanted=wanted, tile_bytes=config.tile_mib * MIB)
            rollout, position = batch.rollout.cpu(), batch.position.cpu()
            rows = single_tokens(rollouts, rollout, position, pair.stop_class)
            learner.append(stats.values["student_logprob"].cpu().double()[rows])
            sampler.append(sampler_logprobs(rollouts, rollout[rows], position[rows]))
    return mismatch_metrics(torch.cat(sampler), torch.cat(learner))


def single_tokens(
    rollouts: list[Rollout], rollout: Int[Tensor, " n"], position: Int[Tensor, " n"], stop_class: tuple[int, ...]
) -> Int[Tensor, " m"]:
    """Indices of the tokens outside the stop class; for those inside, the learner has only the class's log-prob."""
    if not stop_class:
        return torch.arange(len(rollout))
    response_ids = [r.response_ids for r in rollouts]
    ids = [response_ids[i][n] for i, n in zip(rollout.tolist(), position.tolist(), strict=True)]
    return torch.tensor([i for i, token in enumerate(ids) if token not in stop_class], dtype=torch.long)


def mismatch_metrics(sampler: Float[Tensor, " n"], learner: Float[Tensor, " n"]) -> dict[str, float]:
    """Mean, 99.9th percentile (smallest value not exceeded by 99.9 % of the tokens), maximum of |sampler - learner|."""
    if len(sampler) == 0:
        return {}
    difference = (sampler - learner).abs()
    rank = math.ceil(0.999 * len(difference))
    return {
        MISMATCH_MEAN: float(difference.mean()),
        MISMATCH_P999: float(difference.kthvalue(rank).values),
        MISMATCH_MAX: float(difference.max()),
    }


class MismatchCheck:
    """Called with the metrics of each step: stops the run above the limits on mean and 99.9th percentile.

    A token above the limit on the maximum is logged, in the first step that has one: in half precision single
    improbable tokens differ by chance.
    """

    def __init__(self, limits: MismatchLimits, later: MismatchLimits | None = None) -> None:
        """`later`: from step 2 on, if the rollouts are then by older weights."""
        self.limits, self.later, self._warned = limits, later or limits, False

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        """Raise SyncError above the limits; without log-probs of the sampler there is nothing to compare."""
        if MISMATCH_MEAN not in metrics:
            return
        mean, p999, largest = (metrics[name] for name in (MISMATCH_MEAN, MISMATCH_P999, MISMATCH_MAX))
        limits = self.limits if step == 1 else self.later
        if not (mean <= limits.mean and p999 <= limits.p999):  # negated, so that NaN raises too
            raise SyncError(
                f"step {step}: sampler and learner disagree on the log-probs of the sampled tokens: mean difference "
                f"{mean:.2g} nats, 99.9th percentile {p999:.2g}; allowed are {limits.mean:g} and {limits.p999:g}. The "
                "sampler has other weights than the learner, or computes differently; if that is intended, raise "
                "rollout.max_logprob_mismatch.mean and .p999"
            )
        if largest > limits.max and not self._warned:
            self._warned = True
            log.warning(
                "step %d: a sampled token's log-prob differs by %.2g nats between sampler and learner, more than "
                "rollout.max_logprob_mismatch.max (%g); later steps are not reported, %s has them",
                step, largest, limits.max, MISMATCH_MAX,
            )  # fmt: skip
