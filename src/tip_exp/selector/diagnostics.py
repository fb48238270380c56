"""Numbers that tell what a selector did: quadrants, overlap with entropy, where in the response its scores lie."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tip_exp.selector.scores import QUADRANTS
from tip_exp.selector.selector import Quadrants, Selection, Selector, Tokens, budgets, jaccard, keep_top

# Places in the response, doubling twice a bucket: [0, 16), [16, 64), ...
POSITION_EDGES = (0, 16, 64, 256, 1024, 4096, 16384)


def token_metrics(
    statistics: dict[str, Tensor], tokens: Tokens, selection: Selection, selector: Selector
) -> dict[str, float]:
    """Metrics of one step from what was measured; a statistic that was not measured leaves its metrics out."""
    if len(tokens) == 0:
        return {}
    found = {f"score/{name}_mean": float(values.mean()) for name, values in statistics.items()}
    if "entropy" in statistics and selector.score != "full":
        rivals = keep_top(statistics["entropy"], tokens.rollout, budgets(tokens.rollout, selector.retention, "floor"))
        found["select/overlap_entropy"] = jaccard(selection.kept, rivals)
    if {"entropy", "reverse_kl"} <= statistics.keys():
        for name, inside in quadrants(statistics, selector.quadrants).items():
            found[f"quadrant/{name}_share"] = float(inside.float().mean())
            found[f"quadrant/{name}_kept_frac"] = _mean(selection.kept, inside)
            found[f"quadrant/{name}_divergence_share"] = _share(statistics["reverse_kl"], inside)
    for low, high in pairwise(POSITION_EDGES):
        inside = (tokens.position >= low) & (tokens.position < high)
        if bool(inside.any()):
            found[f"select/score_at_{low}_{high - 1}"] = _mean(selection.score, inside)
            found[f"select/kept_at_{low}_{high - 1}"] = _mean(selection.kept, inside)
    return found


def quadrants(statistics: dict[str, Tensor], cuts: Quadrants) -> dict[str, Tensor]:
    """{"q1": (N,) bool, …}: every token is in exactly one (TIP, Table 1)."""
    high_entropy = statistics["entropy"] >= cuts.entropy
    high_divergence = statistics["reverse_kl"] >= cuts.divergence
    return {name: rule(high_entropy, high_divergence) for name, rule in QUADRANTS.items()}


def _mean(values: Tensor, inside: Tensor) -> float:
    """Mean over the marked tokens; 0 where there are none."""
    return float(values[inside].float().mean()) if bool(inside.any()) else 0.0


def _share(values: Tensor, inside: Tensor) -> float:
    total = float(values.sum())
    return float(torch.where(inside, values, 0).sum()) / total if total > 0 else 0.0
