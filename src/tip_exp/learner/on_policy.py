"""Check that rollouts are on-policy: log-probs of the sampled tokens by the sampler against those by the learner.

The learner scores the sampled tokens before it updates, so equal weights give equal log-probs up to rounding. Stale
weights or a layer loaded wrongly do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tip_exp.records.metrics import MISMATCH_MAX, MISMATCH_MEAN, MISMATCH_P99
from tip_exp.types import Rollout


class SyncError(RuntimeError):
    """The sampler's weights are not the learner's."""


@dataclass(frozen=True, slots=True)
class MismatchLimits:
    """Largest |difference of log-probs| that rounding explains, nats: mean over a step's tokens, and of any token."""

    mean: float
    max: float


# float32: measured on CPUs a hundred times below; TF32 on GPUs needs the margin. Half precision: reported for models of
# 1 to 30 B parameters, where single improbable tokens differ by more than 1 nat.
LIMITS = {
    "float32": MismatchLimits(5e-4, 0.02),
    "float16": MismatchLimits(0.01, 0.5),
    "bfloat16": MismatchLimits(0.06, 4.0),
}


def limits_for(*dtypes: str, mean: float | None = None, max: float | None = None) -> MismatchLimits:
    """The given limits; where None, those of the coarsest dtype that sampler or learner computes in."""
    coarsest = sorted((LIMITS[dtype] for dtype in dtypes), key=lambda limits: limits.mean)[-1]
    return MismatchLimits(coarsest.mean if mean is None else mean, coarsest.max if max is None else max)


def sampler_logprobs(
    rollouts: list[Rollout], rollout: Int[Tensor, " n"], position: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Log-probs (nats) that the sampler gave to the tokens at `position` of the responses numbered `rollout`."""
    indices = zip(rollout.tolist(), position.tolist(), strict=True)
    return torch.tensor([rollouts[i].sampler_logprobs[n] for i, n in indices], dtype=torch.float64)


def mismatch_metrics(sampler: Float[Tensor, " n"], learner: Float[Tensor, " n"]) -> dict[str, float]:
    """Mean, 99th percentile (smallest value not exceeded by 99 % of the tokens) and maximum of |sampler - learner|."""
    if len(sampler) == 0:
        return {}
    difference = (sampler - learner).abs()
    rank = math.ceil(0.99 * len(difference))
    return {
        MISMATCH_MEAN: float(difference.mean()),
        MISMATCH_P99: float(difference.kthvalue(rank).values),
        MISMATCH_MAX: float(difference.max()),
    }


def check_logprob_mismatch(metrics: dict[str, float], limits: MismatchLimits, step: int) -> None:
    """Raise SyncError above the limits; without log-probs of the sampler there is nothing to compare."""
    if MISMATCH_MEAN not in metrics:
        return
    mean, largest = metrics[MISMATCH_MEAN], metrics[MISMATCH_MAX]
    if not (mean <= limits.mean and largest <= limits.max):  # negated, so that NaN raises too
        raise SyncError(
            f"step {step}: sampler and learner disagree on the log-probs of the sampled tokens: mean difference "
            f"{mean:.2g} nats, maximum {largest:.2g}; allowed are {limits.mean:g} and {limits.max:g}. The sampler has "
            "other weights than the learner, or computes differently; if that is intended, raise "
            "rollout.max_logprob_mismatch.mean and .max"
        )
