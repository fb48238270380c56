"""Which tokens are trained on: normalize the statistics, score them, apply the budget, return a mask.

Only response tokens are passed in (N of them, flattened over the step's rollouts), so prompt, tool and padding
positions cannot be selected. No gradient flows through a selection.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tip_exp.selector.imports import line_of
from tip_exp.selector.lookup import find_rule, parameter_errors, required_stats, rule_inputs
from tip_exp.selector.normalize import clip_high, normalize
from tip_exp.selector.scores import (
    FALLING,
    NORMALIZED,
    QUADRANTS,
    SCORES,
    Group,
    Normalizer,
    Order,
    Rounding,
    Rule,
    RuleError,
    RuleIsNaN,
    Scope,
    Weight,
)
from tip_exp.selector.weights import token_weights


@dataclass(frozen=True, slots=True)
class Selection:
    """`kept_mask`: (N,) bool. `score`: (N,), what the rule returned.

    `weights`: (N,), at least 0, multiply the kept tokens' divergences; None: all weights are 1. Only their ratios
    matter, since the loss is divided by `mass`.
    """

    kept_mask: Tensor
    score: Tensor
    weights: Tensor | None = None

    @classmethod
    def everything(cls, num_tokens: int) -> Selection:
        """All tokens, with equal weights."""
        ones = torch.ones(num_tokens)
        return cls(ones.bool(), ones)

    def at(self, rows: slice | Tensor) -> Selection:
        """The selection of the tokens at `rows`."""
        return Selection(self.kept_mask[rows], self.score[rows], None if self.weights is None else self.weights[rows])

    def averaged(self, tokens: Tokens, average: str) -> Selection:
        """`mean_by_rollout` if `average` is "rollout"; else the same selection: a mean over all kept tokens."""
        return self.mean_by_rollout(tokens) if average == "rollout" else self

    def mean_by_rollout(self, tokens: Tokens) -> Selection:
        """The same tokens, weighted so that the loss is a mean in each rollout, then over rollouts (TIP, Eq. 1, 8, 9).

        A rollout without kept tokens does not count.
        """
        weights = torch.ones_like(self.score) if self.weights is None else self.weights
        kept_weights = torch.where(self.kept_mask, weights, 0).double()
        num_rollouts = int(tokens.rollout.max()) + 1 if len(tokens) else 0
        sums = kept_weights.new_zeros(num_rollouts).index_add_(0, tokens.rollout, kept_weights)
        averaged = torch.where(kept_weights > 0, kept_weights / sums[tokens.rollout], 0)
        return Selection(self.kept_mask, self.score, averaged)

    @property
    def mass(self) -> float:
        """The divisor of the summed divergence: the number of kept tokens, or the sum of their weights."""
        if self.weights is None:
            return float(self.kept_mask.sum())
        return float(self.weights[self.kept_mask].sum(dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class Tokens:
    """Where each of the N response tokens comes from: rollout index, micro-batch index, position in the response; (N,).

    Two rollouts of 2 and 1 tokens in one micro-batch: rollout=[0, 0, 1], micro_batch=[0, 0, 0], position=[0, 1, 0].
    """

    rollout: Tensor
    micro_batch: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.rollout)

    def uniform_draws(self, generator: torch.Generator) -> Tensor:
        """A uniform number in [0, 1) per token, (N,) float64, that does not depend on the split into micro-batches."""
        order = (self.rollout * (self.position.max() + 1) + self.position).argsort() if len(self) else self.rollout
        draws = torch.rand(len(self), generator=generator, dtype=torch.float64).to(self.rollout.device)
        return torch.empty_like(draws).index_copy_(0, order, draws)

    def groups(self, scope: str) -> Tensor:
        """Group index of each token, (N,): its rollout, its micro-batch, or 0 for scope "batch"."""
        return torch.zeros_like(self.rollout) if scope == "batch" else getattr(self, scope)


@dataclass(frozen=True, slots=True)
class Quadrants:
    """Thresholds, nats: values at or above are high (TIP, Table 1)."""

    entropy: float
    divergence: float

    def masks(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"q1": (N,) bool, …}: each token is in exactly one quadrant."""
        high = statistics["entropy"] >= self.entropy, statistics["reverse_kl"] >= self.divergence
        return {name: rule(*high) for name, rule in QUADRANTS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """A selection rule; the fields are the keys of conf/selector/*.yaml."""

    score: str | Rule  # as lookup.find_rule takes it
    normalizer: Normalizer
    normalize_over: Group
    clip: dict[str, float]  # statistic -> quantile
    order: Order
    rounding: Rounding
    scope: Scope  # what the budget applies to
    retention: float
    quadrants: Quadrants
    weight: Weight
    weight_offset: float | str | None  # of falling weights, as weights.token_weights takes it
    parameters: dict[str, float] = field(default_factory=dict)  # keyword arguments of the rule
    normalizer_of: dict[str, Normalizer] = field(default_factory=dict)  # statistic -> its own normalizer

    def __post_init__(self) -> None:
        if errors := parameter_errors(find_rule(self.score), self.parameters):
            raise ValueError("; ".join(errors))  # now instead of at the first step

    @property
    def rule_name(self) -> str:
        """Of the rule alone: a function's own name, a name without the digest of its code."""
        return str(getattr(self.score, "__name__", self.score)).partition("@")[0]

    @property
    def required_stats(self) -> frozenset[str]:
        """Names of the statistics that `__call__` needs."""
        return required_stats(self.score) | ({"grad_norm"} if self.weight in FALLING else frozenset())

    @torch.no_grad()
    def __call__(self, statistics: dict[str, Tensor], tokens: Tokens, generator: torch.Generator) -> Selection:
        """Select from `statistics` (name -> (N,)); `generator` (CPU) is used by random rules only.

        Raises FloatingPointError if a required statistic is not finite, or if a score is NaN or an infinite weight
        (RuleIsNaN), ValueError if the rule raises an error or returns another shape (RuleError), or if with
        order=sample scores are negative.
        """
        for name in self.required_stats:
            if num_bad := int((~statistics[name].isfinite()).sum()):
                raise FloatingPointError(
                    f"{name} is not finite at {num_bad} of {len(tokens)} tokens: a model returned NaN or infinity"
                )
        rule = find_rule(self.score)
        names = rule_inputs(rule)
        inputs = [self._input(name, statistics, tokens, generator) for name in names]
        try:
            score = rule(*inputs, **self.parameters)
        except (Exception, SystemExit) as error:  # a rule of the user's own may raise anything
            if self.rule_name in SCORES:
                raise
            where = line_of(error, rule)
            raise RuleError(f"the rule {self.rule_name}{where}: {type(error).__name__}: {error}") from error
        if not isinstance(score, Tensor) or score.shape != (len(tokens),):
            what = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise RuleError(f"the rule {self.rule_name} returned {what}, not a score for each of {len(tokens)} tokens")
        score = score.float()
        bad = score.isnan() | (score.isposinf() & (self.weight == "score"))
        if num_bad := int(bad.sum()):
            row = int(bad.nonzero()[0])
            returned = "NaN" if bool(score[row].isnan()) else "infinity"
            values = [f"{name} {float(value[row]):.4g}" for name, value in zip(names, inputs, strict=True)]
            raise RuleIsNaN(
                f"the rule {self.rule_name} returned {returned} at {num_bad} of {len(tokens)} tokens, first "
                f"at rollout {int(tokens.rollout[row])}, position {int(tokens.position[row])} ({', '.join(values)})"
            )
        if self.order == "sample" and bool((score < 0).any()):
            raise ValueError(
                f"selector.order=sample draws in proportion to the score, but the rule {self.rule_name} returned "
                f"{float(score.min()):.3g}; it must be 0 or more"
            )
        weights = token_weights(self.weight, self.weight_offset, score, statistics)
        return Selection(self._choose(score, tokens, generator), score, weights)

    def _input(self, name: str, statistics: dict[str, Tensor], tokens: Tokens, generator: torch.Generator) -> Tensor:
        """The value of a rule's parameter, (N,)."""
        if name in NORMALIZED:
            log_ratio = name == "log_ratio"
            values = statistics["teacher_logprob"] - statistics["student_logprob"] if log_ratio else statistics[name]
            return self._normalized(name, values, tokens.groups(self.normalize_over))
        if name in ("position", "rollout"):
            return getattr(tokens, name).clone()  # a rule may change its inputs
        if name == "response_length":
            return torch.bincount(tokens.rollout)[tokens.rollout]
        if name == "high_entropy":
            return statistics["entropy"] >= self.quadrants.entropy
        if name == "high_divergence":
            return statistics["reverse_kl"] >= self.quadrants.divergence
        if name == "noise":
            return tokens.uniform_draws(generator)
        assert name == "ones", f"a score rule has the unknown parameter {name}"
        return torch.ones(len(tokens), device=tokens.rollout.device)

    def _normalized(self, name: str, values: Tensor, groups: Tensor) -> Tensor:
        """A statistic's values, clipped and normalized within each group, in the tokens' order."""
        order, sizes = groups.argsort(stable=True), torch.bincount(groups).tolist()
        normalizer = self.normalizer_of.get(name, self.normalizer)
        values = values if values.is_floating_point() else values.float()
        output = torch.empty_like(values)
        for rows in order.split(sizes):
            if len(rows):
                output[rows] = normalize(clip_high(values[rows], self.clip.get(name)), normalizer)
        return output

    def _choose(self, score: Tensor, tokens: Tokens, generator: torch.Generator) -> Tensor:
        """The tokens within the budget, in the configured order."""
        if self.order == "positive":
            return score > 0
        key = score
        if self.order == "bottom":
            key = -score
        elif self.order == "sample":
            key = sampling_key(score, tokens.uniform_draws(generator))
        groups = tokens.groups(self.scope)
        return keep_top(key, groups, budgets(groups, self.retention, self.rounding))


def budgets(groups: Int[Tensor, " n"], retention: float, rounding: str) -> Int[Tensor, " g"]:
    """Number of tokens to keep in each group: retention x its size, rounded, and at most its size.

    1e-9 absorbs rounding: 0.29 x 100 = 28.999999999999996.
    """
    sizes = torch.bincount(groups)
    exact = sizes.double() * retention
    if rounding == "ceil":
        return (exact - 1e-9).ceil().long().clamp(min=1).minimum(sizes)
    minimum = 1 if rounding == "at_least_one" else 0
    return (exact + 1e-9).floor().long().clamp(min=minimum).minimum(sizes)


def keep_top(key: Float[Tensor, " n"], groups: Int[Tensor, " n"], budget: Int[Tensor, " g"]) -> Bool[Tensor, " n"]:
    """Mask of the `budget[group]` tokens with the highest key in each group; ties go to the earlier token.

    key [3, 1, 2, 5], groups [0, 0, 0, 1], budget [2, 0] -> [True, False, True, False]
    """
    by_key = key.argsort(descending=True, stable=True)
    order = by_key[groups[by_key].argsort(stable=True)]  # by group, then descending key, then position
    sizes = torch.bincount(groups, minlength=len(budget))
    starts = sizes.cumsum(0) - sizes
    rank_in_group = torch.arange(len(key), device=key.device) - starts[groups[order]]
    kept_mask = torch.zeros(len(key), dtype=torch.bool, device=key.device)
    kept_mask[order] = rank_in_group < budget[groups[order]]
    return kept_mask


def sampling_key(weights: Float[Tensor, " n"], draws: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Keys whose top k are k draws without replacement in proportion to `weights` (Gumbel top-k; Kool et al. 2019).

    `draws` are uniform in [0, 1). Tokens of weight 0 are drawn last.
    """
    return weights.double().log() - (-torch.log1p(-draws)).log()  # log w + Gumbel noise


def jaccard(a: Bool[Tensor, " n"], b: Bool[Tensor, " n"]) -> float:
    """|A and B| / |A or B|; 1 for two empty sets."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0
