"""Metrics that describe a selection: quadrants, overlap with entropy, scores by position in the response."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from tip_exp.records import metrics as names
from tip_exp.selector.selector import Quadrants, Selection, Selector, Tokens, jaccard, keep_top

# Edges of the position buckets [0, 16), [16, 64), …: each bucket ends at four times its start.
POSITION_EDGES = (0, 16, 64, 256, 1024, 4096, 16384)


def token_metrics(
    statistics: dict[str, Tensor], tokens: Tokens, selection: Selection, selector: Selector, vocab_size: int
) -> dict[str, float]:
    """Metrics of one step from its measured statistics; metrics of statistics that were not measured are omitted."""
    kept_mask = selection.kept_mask
    metrics = {names.KEPT_TOKENS: float(kept_mask.sum()), names.RESPONSE_TOKENS: float(len(tokens))}
    metrics |= _kept_shares(statistics, kept_mask, selector.quadrants)
    if len(tokens) == 0:
        return metrics
    metrics |= {names.score_mean(name): float(values.mean()) for name, values in statistics.items()}
    if "entropy" in statistics:
        normalized_entropy = statistics["entropy"] / math.log(vocab_size)  # H / ln V: TIP, Eq. 2
        metrics[names.ENTROPY_NORM_MEAN] = float(normalized_entropy.mean())
        if selector.score != "full":
            kept_per_rollout = torch.bincount(tokens.rollout[kept_mask], minlength=int(tokens.rollout.max()) + 1)
            entropy_mask = keep_top(statistics["entropy"], tokens.rollout, kept_per_rollout)
            metrics[names.OVERLAP_ENTROPY] = jaccard(kept_mask, entropy_mask)
    if {"entropy", "teacher_entropy"} <= statistics.keys():
        metrics[names.ENTROPY_GAP_MEAN] = float((statistics["entropy"] - statistics["teacher_entropy"]).abs().mean())
    if {"entropy", "reverse_kl"} <= statistics.keys():
        for name, in_quadrant in selector.quadrants.masks(statistics).items():
            metrics[names.quadrant_share(name)] = float(in_quadrant.float().mean())
            metrics[names.quadrant_divergence_share(name)] = share_within(statistics["reverse_kl"], in_quadrant)
    for low, high in pairwise(POSITION_EDGES):
        in_bucket = (tokens.position >= low) & (tokens.position < high)
        if bool(in_bucket.any()):
            metrics[names.score_at(low, high - 1)] = _mean_within(selection.score, in_bucket)
            metrics[names.kept_at(low, high - 1)] = _mean_within(kept_mask, in_bucket)
    return metrics


def shadow_metrics(
    shadows: dict[str, Selector],
    statistics: dict[str, Tensor],
    tokens: Tokens,
    kept_mask: Tensor,
    generator_of: Callable[[str], torch.Generator],
) -> dict[str, float]:
    """What each of `shadows` (name -> rule) would keep of a step's tokens, and its overlap with `kept_mask`.

    `generator_of` a shadow's name gives the draws of a random rule. A rule whose statistics are not finite is left out.
    """
    metrics: dict[str, float] = {}
    for name, selector in shadows.items():
        try:
            shadow_mask = selector(statistics, tokens, generator_of(name)).kept_mask
        except FloatingPointError:
            continue
        shares = _kept_shares(statistics, shadow_mask, selector.quadrants)
        shares |= {names.OVERLAP: jaccard(kept_mask, shadow_mask)}
        metrics |= {names.of_shadow(name, metric): value for metric, value in shares.items()}
    return metrics


def _kept_shares(statistics: dict[str, Tensor], kept_mask: Tensor, thresholds: Quadrants) -> dict[str, float]:
    """The shares of tokens, of gradient mass, of KL and of each quadrant's tokens that a mask keeps, by metric.

    A quadrant without tokens has no share.
    """
    shares = {names.KEPT_FRAC: float(kept_mask.sum()) / max(1, len(kept_mask))}
    if len(kept_mask) == 0:
        return shares
    for statistic, mass in (("grad_norm", names.GRADIENT_MASS), ("reverse_kl", names.KL_MASS)):
        if statistic in statistics:
            shares[mass] = share_within(statistics[statistic], kept_mask)
    if {"entropy", "reverse_kl"} <= statistics.keys():
        for name, in_quadrant in thresholds.masks(statistics).items():
            if bool(in_quadrant.any()):
                shares[names.quadrant_kept_frac(name)] = _mean_within(kept_mask, in_quadrant)
    return shares


def _mean_within(values: Tensor, mask: Tensor) -> float:
    """Mean over the masked tokens, of which there is at least one."""
    return float(values[mask].float().mean())


def share_within(values: Tensor, mask: Tensor) -> float:
    """The masked tokens' sum over the sum of all; 0 if that is 0."""
    total = float(values.sum())
    return float(torch.where(mask, values, 0).sum()) / total if total > 0 else 0.0
