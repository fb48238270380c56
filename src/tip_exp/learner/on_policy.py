"""The proof that rollouts are on-policy: their tokens' log-probs as the sampler had them, against the learner's.

The learner scores the very tokens before it updates, so equal weights give equal numbers up to rounding; stale weights
or a wrongly loaded layer do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tip_exp.types import Rollout

MEAN, P99, MAX = "rollout/logprob_mismatch_mean", "rollout/logprob_mismatch_p99", "rollout/logprob_mismatch_max"


class SyncError(RuntimeError):
    """What the sampler samples from is not what the learner trains."""


@dataclass(frozen=True, slots=True)
class MismatchLimits:
    """The largest |difference of log-probs| that rounding explains, nats: a step's mean, and any token's."""

    mean: float
    max: float


# float32: a CPU stays a hundred times below; a GPU's TF32 needs the rest. Half precision: from what others report for
# models of 1 to 30 B, where a single improbable token may differ by more than 1 nat.
LIMITS = {
    "float32": MismatchLimits(5e-4, 0.02),
    "float16": MismatchLimits(0.01, 0.5),
    "bfloat16": MismatchLimits(0.06, 4.0),
}


def limits_for(*dtypes: str, mean: float | None = None, max: float | None = None) -> MismatchLimits:
    """Limits of the coarsest of the types that sampler and learner compute in, unless given."""
    coarsest = sorted((LIMITS[dtype] for dtype in dtypes), key=lambda limits: limits.mean)[-1]
    return MismatchLimits(coarsest.mean if mean is None else mean, coarsest.max if max is None else max)


def sampler_logprobs(rollouts: list[Rollout], rollout: Tensor, position: Tensor) -> Tensor:
    """(N,) log-probs the sampler gave to the tokens at `position` (N,) of the responses numbered `rollout` (N,)."""
    starts = torch.tensor([0, *accumulate(len(one.sampler_logprobs) for one in rollouts)][:-1])
    flat = torch.tensor([value for one in rollouts for value in one.sampler_logprobs], dtype=torch.float64)
    return flat[starts[rollout.cpu()] + position.cpu()]


def mismatch_metrics(sampler: Tensor, learner: Tensor) -> dict[str, float]:
    """Mean, 99th percentile (the smallest value that 99 % do not exceed) and maximum of |sampler - learner|."""
    if len(sampler) == 0:
        return {}
    gap = (sampler - learner).abs()
    rank = math.ceil(0.99 * len(gap))
    return {MEAN: float(gap.mean()), P99: float(gap.kthvalue(rank).values), MAX: float(gap.max())}


def check_logprob_mismatch(metrics: dict[str, float], limits: MismatchLimits, step: int) -> None:
    """Stop a run whose sampler has left the learner; metrics of a sampler without log-probs have nothing to check."""
    if MEAN not in metrics:
        return
    mean, largest = metrics[MEAN], metrics[MAX]
    if not (mean <= limits.mean and largest <= limits.max):  # not: a NaN must not pass
        raise SyncError(
            f"step {step}: sampler and learner disagree on the sampled tokens: |difference of log-probs| is {mean:.2g} "
            f"nats in the mean and {largest:.2g} at most, allowed are {limits.mean:g} and {limits.max:g}. The sampler "
            "has other weights than the learner, or computes otherwise; if that is meant, raise "
            "rollout.max_logprob_mismatch.mean and .max"
        )
