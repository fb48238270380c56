"""Which tokens are trained on: score rule x normaliser x budget, from per-token statistics to a mask.

Only response tokens come in (N of them, flattened over the step's rollouts), so prompt, tool and padding positions
cannot be chosen. No gradient flows through a selection.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tip_exp.selector.scores import SCORES, STATISTICS, Group, Normalizer, Order, Rounding, Scope, reads


@dataclass(frozen=True, slots=True)
class Selection:
    """`kept`: (N,) bool. `score`: (N,) what the rule gave, before any sampling.

    `weights`: (N,) factors of the kept tokens' divergences, at least 0; None: each counts once. They matter relative to
    each other alone, for the loss is divided by `mass`.
    """

    kept: Tensor
    score: Tensor
    weights: Tensor | None = None

    @property
    def mass(self) -> float:
        """What the summed divergence is divided by: the number of kept tokens, or their weights' sum."""
        return float(self.kept.sum() if self.weights is None else self.weights[self.kept].sum(dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class Tokens:
    """Where the N response tokens come from: `rollout` and `micro_batch` number their group, `position` is the place in
    the response. Two rollouts of 2 and 1 tokens in one micro-batch: rollout=[0, 0, 1], micro_batch=[0, 0, 0],
    position=[0, 1, 0]."""

    rollout: Tensor
    micro_batch: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.rollout)

    def draws(self, generator: torch.Generator) -> Tensor:
        """A uniform number in [0, 1) for each token, the same however the rollouts are split into micro-batches."""
        in_order = (self.rollout * (self.position.max() + 1) + self.position).argsort() if len(self) else self.rollout
        numbers = torch.rand(len(self), generator=generator, dtype=torch.float64).to(self.rollout.device)
        return torch.empty_like(numbers).index_copy_(0, in_order, numbers)

    def groups(self, of: str) -> Tensor:
        if of == "batch":
            return torch.zeros_like(self.rollout)
        return self.rollout if of == "rollout" else self.micro_batch


@dataclass(frozen=True, slots=True)
class Quadrants:
    """Cuts between low and high, nats; at the cut is high."""

    entropy: float
    divergence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """One rule of the paper, or one's own, as conf/selector/*.yaml composes it."""

    score: str
    normalizer: Normalizer
    normalize_over: Group
    clip: dict[str, float]
    order: Order
    rounding: Rounding
    scope: Scope
    retention: float
    quadrants: Quadrants
    weight_by_score: bool = False  # the default is for records of runs from before this key

    @property
    def reads(self) -> frozenset[str]:
        """Names of the statistics that must be measured before `__call__`."""
        return reads(self.score)

    @torch.no_grad()
    def __call__(self, statistics: dict[str, Tensor], tokens: Tokens, generator: torch.Generator) -> Selection:
        """Score and choose. `generator` (CPU) serves the random rules alone."""
        for name in self.reads:
            if not statistics[name].isfinite().all():
                bad = int((~statistics[name].isfinite()).sum())
                raise FloatingPointError(
                    f"{name} is not finite at {bad} of {len(tokens)} tokens: a model gave NaN logits"
                )
        rule = SCORES[self.score]
        axes = [self._axis(name, statistics, tokens, generator) for name in inspect.signature(rule).parameters]
        score = rule(*axes).float()
        weights = score.clamp(min=0) if self.weight_by_score else None
        return Selection(self._choose(score, tokens, generator), score, weights)

    def _axis(self, name: str, statistics: dict[str, Tensor], tokens: Tokens, generator: torch.Generator) -> Tensor:
        device = tokens.rollout.device
        if name in STATISTICS:
            values, groups = statistics[name], tokens.groups(self.normalize_over)
            return per_group(lambda v: normalize(clip_high(v, self.clip.get(name)), self.normalizer), values, groups)
        if name == "high_entropy":
            return statistics["entropy"] >= self.quadrants.entropy
        if name == "high_divergence":
            return statistics["reverse_kl"] >= self.quadrants.divergence
        if name == "noise":
            return tokens.draws(generator)
        assert name == "ones", f"no axis is called {name}"
        return torch.ones(len(tokens), device=device)

    def _choose(self, score: Tensor, tokens: Tokens, generator: torch.Generator) -> Tensor:
        if self.order == "positive":
            return score > 0
        if self.order == "bottom":
            key = -score
        elif self.order == "sample":
            key = sampling_key(score, tokens.draws(generator))
        else:
            key = score
        groups = tokens.groups(self.scope)
        return keep_top(key, groups, budgets(groups, self.retention, self.rounding))


def clip_high(values: Float[Tensor, " n"], quantile: float | None) -> Float[Tensor, " n"]:
    """Cut values above their own quantile down to it (TIP, Sec. 6: the top 2 % of entropies)."""
    return values if quantile is None else values.clamp(max=_quantile(values, quantile))


def normalize(values: Float[Tensor, " n"], kind: str) -> Float[Tensor, " n"]:
    """Map one population to [0, 1]; where all are equal there is nothing to tell apart, and every value is 0.

    minmax: (v - min) / (max - min). quantile: the same between the 5th and 95th percentile, cut at 0 and 1.
    rank: place among the population, ties share the middle of their places. none: as it is.
    """
    if kind == "none" or len(values) == 0:
        return values
    if kind == "rank":
        ordered = values.sort().values
        below, upto = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
        middle = (below + upto - 1).to(values.dtype) / 2
        return middle / (len(values) - 1) if bool(ordered[0] < ordered[-1]) else torch.zeros_like(values)
    low, high = (_quantile(values, 0.05), _quantile(values, 0.95)) if kind == "quantile" else values.aminmax()
    if not bool(low < high):
        return torch.zeros_like(values)
    return ((values - low) / (high - low)).clamp(0, 1)


def budgets(groups: Int[Tensor, " n"], retention: float, rounding: str) -> Int[Tensor, " g"]:
    """How many tokens each group may keep: retention x its length, rounded; never more than it has.

    A hair is added before rounding, for 0.29 x 100 is 28.999999999999996.
    """
    lengths = torch.bincount(groups)
    exact = lengths.double() * retention
    if rounding == "ceil":
        return (exact - 1e-9).ceil().long()
    least = 1 if rounding == "at_least_one" else 0
    return (exact + 1e-9).floor().long().clamp(min=least).minimum(lengths)


def keep_top(key: Float[Tensor, " n"], groups: Int[Tensor, " n"], budget: Int[Tensor, " g"]) -> Bool[Tensor, " n"]:
    """In each group the `budget[group]` tokens of the highest key; of equal keys the earlier token.

    key [3, 1, 2, 5], groups [0, 0, 0, 1], budget [2, 0] -> [True, False, True, False]
    """
    by_key = key.argsort(descending=True, stable=True)
    order = by_key[groups[by_key].argsort(stable=True)]  # group by group, best first, earlier first
    sizes = torch.bincount(groups, minlength=len(budget))
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(key), device=key.device) - starts[groups[order]]
    kept = torch.zeros(len(key), dtype=torch.bool, device=key.device)
    kept[order] = place < budget[groups[order]]
    return kept


def sampling_key(weights: Float[Tensor, " n"], draws: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Keys whose top k are a draw of k without replacement in proportion to `weights` (Gumbel top-k; Kool et al. 2019).

    `draws` are uniform in [0, 1). A weight of zero is drawn only when nothing else is left.
    """
    return weights.double().log() - (-torch.log1p(-draws)).log()


def per_group(function: Callable[[Tensor], Tensor], values: Tensor, groups: Tensor) -> Tensor:
    """Apply a function to each group's values and put the results back in place."""
    out = torch.empty_like(values)
    for group in groups.unique():
        mine = groups == group
        out[mine] = function(values[mine])
    return out


def jaccard(a: Bool[Tensor, " n"], b: Bool[Tensor, " n"]) -> float:
    """|A and B| / |A or B|; two empty sets are equal."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def _quantile(values: Tensor, q: float) -> Tensor:
    """Linear interpolation between order statistics, as numpy does; torch.quantile refuses 2^24 values and more."""
    ordered = values.sort().values
    at = q * (len(values) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return low + (high - low) * (at - math.floor(at))
