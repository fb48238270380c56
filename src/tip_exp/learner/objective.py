"""The per-token objective that a run's configuration names."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from tip_exp.config.schema import LearnerConfig
from tip_exp.losses.divergence import Divergence
from tip_exp.losses.estimators import Objective, SampledK1, TopK
from tip_exp.losses.token_stats import Statistics
from tip_exp.selector.normalize import quantile_of

ObjectiveOf = Callable[[Tensor], Objective]  # of the token ids of some response tokens


def objective_stats(config: LearnerConfig) -> frozenset[str]:
    """Names of the statistics of a step's response tokens that its objective depends on."""
    is_quantile = config.divergence == "clipped_kl" and isinstance(config.kl_clip, str)
    return frozenset({"reverse_kl"} if is_quantile else ())


def make_objective(config: LearnerConfig, statistics: Statistics) -> ObjectiveOf:
    """The objective of a step; `statistics` has those of `objective_stats`, of all its response tokens."""
    divergence = Divergence(config.divergence, config.jsd_beta, config.skew, _clip(config, statistics))

    def objective(token_ids: Tensor) -> Objective:
        if config.estimator == "topk":
            return TopK(divergence, config.topk.k, config.topk.support, config.topk.rest)
        return SampledK1(token_ids) if config.estimator == "sampled_k1" else divergence

    return objective


def _clip(config: LearnerConfig, statistics: Statistics) -> float:
    """`learner.kl_clip` in nats; NaN if a statistic is NaN."""
    if not isinstance(config.kl_clip, str):
        return config.kl_clip
    if not objective_stats(config) or not len(statistics["reverse_kl"]):
        return math.inf
    return float(quantile_of(statistics["reverse_kl"], float(config.kl_clip.removeprefix("q"))))
