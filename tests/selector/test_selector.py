"""Selection: budgets, ranking, ties, sampling, normalizers, quadrants and the metrics of a selection."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import reference
from torch import Tensor

from tip_exp.selector import lookup, scores
from tip_exp.selector.selector import (
    Quadrants,
    Selection,
    Selector,
    Tokens,
    budgets,
    clip_high,
    jaccard,
    keep_top,
    normalize,
    sampling_key,
)

DEFAULTS: dict[str, Any] = {
    "score": "soft_or",
    "normalizer": "minmax",
    "normalize_over": "batch",
    "clip": {},
    "order": "top",
    "rounding": "floor",
    "scope": "rollout",
    "retention": 0.5,
    "quadrants": Quadrants(0.3, 0.3),
    "weight": "none",
    "weight_offset": None,
}


def selector(**changes: Any) -> Selector:
    return Selector(**{**DEFAULTS, **changes})


def tokens_of(*lengths: int) -> Tokens:
    """Rollouts of these lengths, two per micro-batch."""
    rollout = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]) if lengths else torch.zeros(0).long()
    position = torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.zeros(0).long()
    return Tokens(rollout, rollout // 2, position)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_statistics(n: int, seed: int = 0) -> dict[str, Tensor]:
    g = seeded(seed)
    return {name: torch.rand(n, generator=g) * 3 for name in scores.STATISTICS}


# --- budgets and ranking ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [("floor", [5, 0, 3]), ("ceil", [5, 1, 4]), ("at_least_one", [5, 1, 3])],  # half of 10, 1 and 7 tokens
)
def test_rounding_of_budgets(rounding: str, expected: list[int]) -> None:
    assert budgets(tokens_of(10, 1, 7).rollout, 0.5, rounding).tolist() == expected


def test_budgets_are_exact_despite_binary_fractions() -> None:
    assert 0.29 * 100 < 29  # 28.999999999999996
    assert budgets(tokens_of(100).rollout, 0.29, "floor").tolist() == [29]
    assert budgets(tokens_of(100).rollout, 0.07, "ceil").tolist() == [7]  # 7.000000000000001
    assert budgets(tokens_of(100).rollout, 1e-12, "ceil").tolist() == [1]


def test_a_rule_cannot_change_the_positions_of_the_run() -> None:
    def shifts(position: Tensor) -> Tensor:
        return position.add_(5)

    tokens = tokens_of(3)
    selector(score=shifts, retention=0.4)({}, tokens, seeded())
    assert tokens.position.tolist() == [0, 1, 2]


def test_keep_top_example_of_the_docstring() -> None:
    kept_mask = keep_top(torch.tensor([3.0, 1, 2, 5]), torch.tensor([0, 0, 0, 1]), torch.tensor([2, 0]))
    assert kept_mask.tolist() == [True, False, True, False]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=40), st.floats(0.01, 1.0))
def test_keep_top_equals_sorting_in_python(group_and_key: list[tuple[int, int]], retention: float) -> None:
    """Few distinct keys, so there are many ties: the earlier token must win them."""
    groups, keys = [group for group, _ in group_and_key], [float(key) for _, key in group_and_key]
    group_tensor = torch.tensor(groups).long()
    kept_mask = keep_top(torch.tensor(keys), group_tensor, budgets(group_tensor, retention, "floor"))
    assert kept_mask.tolist() == reference.keep_top(keys, groups, retention)


@given(st.integers(0, 100), st.lists(st.integers(1, 12), min_size=1, max_size=6), st.floats(0.05, 1.0))
def test_the_highest_scores_are_kept_within_the_budget(seed: int, lengths: list[int], retention: float) -> None:
    tokens, statistics = tokens_of(*lengths), random_statistics(sum(lengths), seed)
    selection = selector(retention=retention)(statistics, tokens, seeded())
    expected = reference.keep_top(selection.score.tolist(), tokens.rollout.tolist(), retention)
    assert selection.kept_mask.tolist() == expected


def test_bottom_keeps_the_lowest_scores() -> None:
    selection = selector(score="entropy", order="bottom")({"entropy": torch.arange(6.0)}, tokens_of(6), seeded())
    assert selection.kept_mask.tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("order", ["top", "bottom", "sample"])
def test_every_order_has_the_same_budget(order: str) -> None:
    """floor(0.5 x 7) + floor(0.5 x 3) = 3 + 1"""
    rule = selector(score="entropy", order=order, normalizer="none")
    selection = rule({"entropy": torch.arange(1.0, 11)}, tokens_of(7, 3), seeded())
    assert [int(selection.kept_mask[part].sum()) for part in (slice(0, 7), slice(7, 10))] == [3, 1]


@pytest.mark.parametrize(
    "scope, kept", [("rollout", [False, True, True, False]), ("batch", [True, True, False, False])]
)
def test_grad_norm_keeps_the_largest_gradients(scope: str, kept: list[bool]) -> None:
    """Half of each rollout of two, or half of all four."""
    statistics = {"grad_norm": torch.tensor([0.4, 0.9, 0.3, 0.1])}
    assert selector(score="grad_norm", scope=scope)(statistics, tokens_of(2, 2), seeded()).kept_mask.tolist() == kept


def test_batch_scope_can_leave_a_rollout_without_tokens() -> None:
    statistics = {"entropy": torch.tensor([9.0, 8, 1, 2])}
    selection = selector(score="entropy", scope="batch")(statistics, tokens_of(2, 2), seeded())
    assert selection.kept_mask.tolist() == [True, True, False, False]


# --- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_draws_in_proportion_to_the_weights() -> None:
    """Chi-square over 20,000 draws of one of four, weights 1:2:3:4; 16.3 is the 0.1 % point at 3 degrees of freedom."""
    weights, draws, g = torch.tensor([1.0, 2, 3, 4]), 20_000, seeded()
    counts = torch.zeros(4)
    for _ in range(draws):
        counts[sampling_key(weights, torch.rand(4, generator=g)).argmax()] += 1
    expected = draws * weights / weights.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3


@pytest.mark.parametrize("seed", range(20))
def test_tokens_of_weight_zero_are_sampled_last(seed: int) -> None:
    rule = selector(score="entropy", order="sample", normalizer="none")
    selection = rule({"entropy": torch.tensor([0.0, 1, 0, 1, 0, 1])}, tokens_of(6), seeded(seed))
    assert selection.kept_mask.tolist() == [False, True] * 3


def test_sampling_refuses_a_negative_score() -> None:
    """The logarithm of a negative weight is NaN, which sorts first: these tokens would always be kept."""
    rule = selector(score="log_ratio", order="sample", normalizer="none")
    statistics = {"student_logprob": torch.tensor([-1.0, -1, -2]), "teacher_logprob": torch.tensor([-1.0, -3, -1])}
    with pytest.raises(ValueError, match=r"order=sample .* rule log_ratio returned -2; it must be 0 or more"):
        rule(statistics, tokens_of(3), seeded())


def test_sampling_is_a_function_of_the_seed() -> None:
    rule, statistics = selector(score="entropy", order="sample", normalizer="none"), random_statistics(40)
    seed_1, seed_1_again, seed_2 = (rule(statistics, tokens_of(40), seeded(seed)).kept_mask for seed in (1, 1, 2))
    assert seed_1.equal(seed_1_again) and not seed_1.equal(seed_2)


def test_importance_weighted_sampling_is_unbiased() -> None:
    """App. A.3: the sum over sampled tokens of g_t / p_t has mean sum g_t (one token per draw, p = h / sum h)."""
    h, g = torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([5.0, -1.0, 2.0, 0.5])
    generator, total, draws = seeded(3), 0.0, 40_000
    for _ in range(draws):
        i = int(sampling_key(h, torch.rand(4, generator=generator)).argmax())
        total += float(g[i] / (h[i] / h.sum()))
    # variance of one draw: sum p (g/p)^2 - (sum g)^2 = 250 + 2.5 + 20 + 0.83 - 42.25 = 231.1 -> se 0.076
    assert abs(total / draws - float(g.sum())) < 4 * math.sqrt(231.1 / draws)


def test_draws_do_not_depend_on_the_order_of_micro_batches() -> None:
    tokens = tokens_of(3, 4)
    order = torch.tensor([3, 4, 5, 6, 0, 1, 2])
    reordered = Tokens(tokens.rollout[order], tokens.micro_batch[order], tokens.position[order])
    assert reordered.uniform_draws(seeded()).equal(tokens.uniform_draws(seeded())[order])


def test_draws_are_in_the_order_of_rollouts_and_positions() -> None:
    """As one stream of a seed, so that a random selection can be drawn again from rollouts alone."""
    in_order = torch.rand(7, generator=seeded(), dtype=torch.float64)
    assert tokens_of(4, 3).uniform_draws(seeded()).equal(in_order)


def test_random_keeps_the_budget_and_needs_no_statistics() -> None:
    rule = selector(score="random", normalizer="none", retention=0.2)
    assert rule.required_stats == frozenset()
    kept_mask = rule({}, tokens_of(50, 50), seeded()).kept_mask
    assert kept_mask.sum() == 20 and kept_mask[:50].sum() == 10
    assert not kept_mask.equal(rule({}, tokens_of(50, 50), seeded(1)).kept_mask)


# --- normalizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalizer", "values", "expected"),
    [
        ("minmax", [2.0, 4, 3], [0.0, 1, 0.5]),
        ("rank", [10.0, 30, 20], [0.0, 1, 0.5]),
        ("rank", [1.0, 1, 2], [0.25, 0.25, 1]),  # ranks 0 and 1 shared
        ("none", [2.0, 4, 3], [2.0, 4, 3]),
        ("minmax", [5.0, 5, 5], [0.0, 0, 0]),
        ("rank", [5.0, 5, 5], [0.0, 0, 0]),
        ("quantile", [5.0, 5, 5], [0.0, 0, 0]),
        ("minmax", [7.0], [0.0]),
        ("rank", [7.0], [0.0]),
        ("minmax", [], []),
    ],
)
def test_normalize(normalizer: str, values: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(normalize(torch.tensor(values), normalizer), torch.tensor(expected))


def test_the_quantile_normalizer_clamps_both_tails() -> None:
    normalized = normalize(torch.arange(101.0), "quantile")  # 5th percentile 5, 95th 95
    torch.testing.assert_close(normalized[[0, 5, 50, 95, 100]], torch.tensor([0.0, 0, 0.5, 1, 1]))


def test_clip_uses_numpys_linear_quantile() -> None:
    values = torch.tensor([0.0, 1, 2, 100])  # index 0.5 * 3 = 1.5 -> 1.5; index 0.98 * 3 = 2.94 -> 2 + 0.94 * 98
    torch.testing.assert_close(clip_high(values, 0.5), torch.tensor([0.0, 1, 1.5, 1.5]))
    torch.testing.assert_close(clip_high(values, 0.98).max(), torch.tensor(2 + 0.94 * 98))
    assert clip_high(values, None).equal(values)


@pytest.mark.parametrize(
    ("normalize_over", "expected"),
    [
        ("rollout", [0, 1, 0, 1, 0, 1]),
        ("micro_batch", [0, 1 / 20, 0.5, 1, 0, 1]),  # rollouts 0 and 1 share a micro-batch
        ("batch", [0, 0.01, 0.1, 0.2, 0, 1]),
    ],
)
def test_normalize_over_is_the_group_of_the_minimum_and_maximum(normalize_over: str, expected: list[float]) -> None:
    statistics = {"entropy": torch.tensor([0.0, 1, 10, 20, 0, 100])}
    selection = selector(score="entropy", normalize_over=normalize_over)(statistics, tokens_of(2, 2, 2), seeded())
    assert selection.score.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("score", ["soft_or", "q3", "entropy", "reverse_kl"])
@given(st.integers(0, 50), st.sampled_from(["minmax", "quantile", "rank"]), st.sampled_from(["batch", "rollout"]))
def test_scores_are_finite_and_in_the_unit_interval(
    score: str, seed: int, normalizer: str, normalize_over: str
) -> None:
    rule = selector(score=score, normalizer=normalizer, normalize_over=normalize_over)
    values = rule(random_statistics(30, seed), tokens_of(1, 9, 20), seeded()).score
    assert values.isfinite().all() and float(values.min()) >= 0 and float(values.max()) <= 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"score": "q3"}, {"score": "random", "normalizer": "none"}, {"score": "full", "order": "positive"}],
)
def test_no_tokens_give_an_empty_mask(changes: dict[str, Any]) -> None:
    assert selector(**changes)(random_statistics(0), tokens_of(), seeded()).kept_mask.shape == (0,)


def test_floor_keeps_nothing_of_one_token_rollouts() -> None:
    assert not selector()(random_statistics(3), tokens_of(1, 1, 1), seeded()).kept_mask.any()
    assert selector(rounding="at_least_one")(random_statistics(3), tokens_of(1, 1, 1), seeded()).kept_mask.all()


def test_equal_statistics_keep_the_earliest_tokens() -> None:
    statistics = {name: torch.ones(6) for name in scores.STATISTICS}
    assert selector()(statistics, tokens_of(6), seeded()).kept_mask.tolist() == [True] * 3 + [False] * 3


def test_nan_statistics_are_an_error() -> None:
    statistics = random_statistics(4)
    statistics["reverse_kl"][2] = math.nan
    with pytest.raises(FloatingPointError, match="reverse_kl is not finite at 1 of 4 tokens"):
        selector()(statistics, tokens_of(4), seeded())


def test_kept_tokens_are_weighted_by_their_score() -> None:
    """Entropies 0, 3, 4, 1 give scores 0, .75, 1, .25; the two kept tokens have mass 0.75 + 1 instead of 2."""
    statistics, tokens = {"entropy": torch.tensor([0.0, 3.0, 4.0, 1.0])}, tokens_of(4)
    unweighted = selector(score="entropy")(statistics, tokens, seeded())
    weighted = selector(score="entropy", weight="score")(statistics, tokens, seeded())
    assert unweighted.weights is None and unweighted.mass == 2.0
    assert weighted.kept_mask.tolist() == unweighted.kept_mask.tolist() == [False, True, True, False]
    assert weighted.weights is not None and weighted.weights.tolist() == [0.0, 0.75, 1.0, 0.25]
    assert weighted.mass == 1.75


@pytest.mark.parametrize(
    "weight, offset, expected",
    [
        ("inverse_gradient", None, [1 / 0.1, 1 / 0.5, 1 / 1.0]),  # c = 0.1
        ("sqrt", None, [0.05**-0.5, 0.45**-0.5, 0.95**-0.5]),  # c = 0.05
        ("inverse_gradient", 0.6, [1 / 0.6, 1.0, 1 / 1.5]),
        ("sqrt", "q0.5", [0.4**-0.5, 0.8**-0.5, 1.3**-0.5]),  # c = 0.4, the median
    ],
)
def test_weights_fall_with_the_gradient(weight: str, offset: Any, expected: list[float]) -> None:
    rule = selector(score="entropy", weight=weight, weight_offset=offset, retention=1.0)
    statistics = {"entropy": torch.tensor([1.0, 2, 3]), "grad_norm": torch.tensor([0.0, 0.4, 0.9])}
    assert rule.required_stats == {"entropy", "grad_norm"}
    selection = rule(statistics, tokens_of(3), seeded())
    assert selection.weights is not None and selection.weights.tolist() == pytest.approx(expected)
    assert selection.mass == pytest.approx(sum(expected))
    assert rule({name: values[:0] for name, values in statistics.items()}, tokens_of(), seeded()).mass == 0


def test_weights_stay_finite_where_no_token_has_a_gradient() -> None:
    rule = selector(score="entropy", weight="inverse_gradient", weight_offset="q0.9", retention=1.0)
    selection = rule({"entropy": torch.ones(3), "grad_norm": torch.zeros(3)}, tokens_of(3), seeded())
    assert selection.weights is not None and bool(selection.weights.isfinite().all())


def test_a_mean_by_rollout_weighs_rollouts_alike() -> None:
    """Rollouts of 3, 1 and 2 tokens, of which 2, 1 and 0 are kept: weights 1/2, 1/2, 1, and a mass of two rollouts."""
    tokens = Tokens(
        torch.tensor([0, 0, 0, 1, 2, 2]), torch.zeros(6, dtype=torch.long), torch.tensor([0, 1, 2, 0, 0, 1])
    )
    kept_mask = torch.tensor([True, False, True, True, False, False])
    selection = Selection(kept_mask, torch.ones(6)).mean_by_rollout(tokens)
    assert selection.weights.tolist() == [0.5, 0.0, 0.5, 1.0, 0.0, 0.0]
    assert selection.mass == 2.0
    weighted = Selection(kept_mask, torch.ones(6), torch.tensor([3.0, 9, 1, 5, 9, 9])).mean_by_rollout(tokens)
    assert weighted.weights.tolist() == [0.75, 0.0, 0.25, 1.0, 0.0, 0.0]
    nothing = Selection(torch.zeros(6, dtype=torch.bool), torch.ones(6)).mean_by_rollout(tokens)
    assert nothing.mass == 0.0


def test_equal_scores_as_weights_have_no_mass() -> None:
    """All scores are 0, so the learner skips the step instead of dividing by zero."""
    rule = selector(score="entropy", weight="score")
    assert rule({"entropy": torch.ones(4)}, tokens_of(4), seeded()).mass == 0.0


# --- the paper -------------------------------------------------------------------------------------------------------

UNIT = st.floats(0, 1)


@given(UNIT, UNIT)
def test_remark_1_soft_or(h: float, d: float) -> None:
    def soft_or(h: float, d: float) -> float:
        return float(scores.soft_or(torch.tensor(h, dtype=torch.float64), torch.tensor(d, dtype=torch.float64)))

    assert soft_or(0, d) == pytest.approx(d) and soft_or(h, 0) == pytest.approx(h) and soft_or(1, 1) == 1
    assert soft_or(h, d) == pytest.approx(1 - (1 - h) * (1 - d)) and soft_or(h, d) == pytest.approx(soft_or(d, h))
    assert max(h, d) - 1e-12 <= soft_or(h, d) <= 1


def test_proposition_2_a_rule_of_entropy_alone_cannot_tell_q3_from_q4() -> None:
    """A confident right token (d = 0) and a confident wrong one (d = 9) have equal entropy but different scores."""
    statistics = {
        "entropy": torch.tensor([0.0, 0.0, 1.0]),
        "reverse_kl": torch.tensor([0.0, 9.0, 0.0]),
        "forward_kl": torch.tensor([0.0, 9.0, 0.0]),
    }
    entropy, soft_or, q3 = (
        selector(score=score)(statistics, tokens_of(3), seeded()).score for score in ("entropy", "soft_or", "q3")
    )
    assert entropy[0] == entropy[1] == 0  # f(0) = 0: no weight for Q3, whatever its divergence
    assert soft_or[1] > soft_or[0] and q3[1] > q3[0]
    assert q3.argmax() == 1


# Tokens of these statistics at thresholds of 0.3; a value at the threshold is high.
QUADRANT_STATISTICS = {
    "entropy": torch.tensor([0.5, 0.5, 0.1, 0.1, 0.3]),
    "reverse_kl": torch.tensor([0.5, 0.1, 0.5, 0.1, 0.3]),
}
QUADRANT_TOKENS = {"q1": [0, 4], "q2": [1], "q3": [2], "q4": [3]}


@pytest.mark.parametrize(("quadrant", "score"), [("q1", "q1"), ("q2", "q2"), ("q3", "q3_quadrant"), ("q4", "q4")])
def test_a_quadrant_rule_keeps_its_quadrant(quadrant: str, score: str) -> None:
    rule = selector(score=score, order="positive", normalizer="none")
    kept_mask = rule(QUADRANT_STATISTICS, tokens_of(5), seeded()).kept_mask
    assert kept_mask.nonzero().squeeze(-1).tolist() == QUADRANT_TOKENS[quadrant]


@pytest.mark.parametrize("score", scores.SCORES)
def test_every_rule_runs_with_its_required_statistics_alone(score: str) -> None:
    parameters = {p.name: 0.5 for p in signature(scores.SCORES[score]).parameters.values() if p.kind == p.KEYWORD_ONLY}
    rule = selector(score=score, order="positive" if score in scores.UNBUDGETED else "top", parameters=parameters)
    statistics = {name: values for name, values in random_statistics(8).items() if name in rule.required_stats}
    assert statistics.keys() == rule.required_stats
    assert rule(statistics, tokens_of(8), seeded()).score.shape == (8,)


def test_required_statistics() -> None:
    assert lookup.required_stats("soft_or") == {"entropy", "reverse_kl"}
    assert lookup.required_stats("q3") == {"entropy", "forward_kl"}
    assert lookup.required_stats("q1") == {"entropy", "reverse_kl"}
    assert lookup.required_stats("full") == lookup.required_stats("random") == frozenset()


def test_jaccard() -> None:
    a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    assert jaccard(a, b) == pytest.approx(1 / 3)
    assert jaccard(a & False, b & False) == 1.0
