"""Selection: the budget is kept, the best are kept, earlier tokens win ties, odd populations are defined."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tip_exp.selector import scores
from tip_exp.selector.diagnostics import quadrants, token_metrics
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
}


def selector(**changes: Any) -> Selector:
    return Selector(**{**DEFAULTS, **changes})


def tokens(*lengths: int) -> Tokens:
    """Rollouts of these lengths, two to a micro-batch."""
    rollout = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]) if lengths else torch.zeros(0).long()
    position = torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.zeros(0).long()
    return Tokens(rollout, rollout // 2, position)


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def statistics(n: int, seed: int = 0) -> dict[str, Tensor]:
    g = chance(seed)
    return {name: torch.rand(n, generator=g) * 3 for name in scores.STATISTICS}


# --- budgets and the top ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [("floor", [5, 0, 3]), ("ceil", [5, 1, 4]), ("at_least_one", [5, 1, 3])],  # half of 10, 1 and 7 tokens
)
def test_budgets_round_as_they_say(rounding: str, expected: list[int]) -> None:
    assert budgets(tokens(10, 1, 7).rollout, 0.5, rounding).tolist() == expected


def test_budget_is_not_a_victim_of_binary_fractions() -> None:
    assert 0.29 * 100 < 29  # 28.999999999999996
    assert budgets(tokens(100).rollout, 0.29, "floor").tolist() == [29]
    assert budgets(tokens(100).rollout, 0.07, "ceil").tolist() == [7]  # 7.000000000000001


def test_keep_top_of_the_docstring() -> None:
    kept = keep_top(torch.tensor([3.0, 1, 2, 5]), torch.tensor([0, 0, 0, 1]), torch.tensor([2, 0]))
    assert kept.tolist() == [True, False, True, False]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=40), st.floats(0.01, 1.0))
def test_keep_top_equals_sorting_in_python(rows: list[tuple[int, int]], retention: float) -> None:
    """Few distinct keys, so ties abound: the earlier token must win them."""
    groups, key = torch.tensor([g for g, _ in rows]).long(), torch.tensor([float(k) for _, k in rows])
    budget = budgets(groups, retention, "floor") if rows else torch.zeros(1).long()
    kept = keep_top(key, groups, budget)
    expected = [False] * len(rows)
    for group in {g for g, _ in rows}:
        mine = [i for i, (g, _) in enumerate(rows) if g == group]
        count = math.floor(len(mine) * retention + 1e-9)
        for i in sorted(mine, key=lambda i: (-rows[i][1], i))[:count]:
            expected[i] = True
    assert kept.tolist() == expected


@given(st.integers(0, 100), st.lists(st.integers(1, 12), min_size=1, max_size=6), st.floats(0.05, 1.0))
def test_kept_tokens_outrank_the_rest_and_the_budget_is_exact(seed: int, lengths: list[int], retention: float) -> None:
    where, stats = tokens(*lengths), statistics(sum(lengths), seed)
    chosen = selector(retention=retention)(stats, where, chance())
    for rollout, length in enumerate(lengths):
        mine = where.rollout == rollout
        kept, left = chosen.score[mine & chosen.kept], chosen.score[mine & ~chosen.kept]
        assert len(kept) == math.floor(length * retention + 1e-9)
        assert not len(kept) or not len(left) or kept.min() >= left.max()


def test_bottom_is_the_other_end() -> None:
    where, stats = tokens(6), {"entropy": torch.arange(6.0)}
    assert selector(score="entropy", order="bottom")(stats, where, chance()).kept.tolist() == [True] * 3 + [False] * 3


def test_batch_scope_may_starve_a_rollout() -> None:
    stats = {"entropy": torch.tensor([9.0, 8, 1, 2])}
    kept = selector(score="entropy", scope="batch")(stats, tokens(2, 2), chance()).kept
    assert kept.tolist() == [True, True, False, False]


# --- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_draws_in_proportion_to_the_weights() -> None:
    """Chi-square over 20,000 draws of one of four, weights 1:2:3:4; 16.3 is the 0.1 % point at 3 degrees of freedom."""
    weights, draws, g = torch.tensor([1.0, 2, 3, 4]), 20_000, chance()
    counts = torch.zeros(4)
    for _ in range(draws):
        counts[sampling_key(weights, torch.rand(4, generator=g)).argmax()] += 1
    expected = draws * weights / weights.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3


def test_sampling_takes_zero_weights_last_and_is_a_function_of_the_seed() -> None:
    where = tokens(6)
    stats = {"entropy": torch.tensor([0.0, 1, 0, 1, 0, 1])}
    rule = selector(score="entropy", order="sample", normalizer="none")
    for seed in range(20):
        assert rule(stats, where, chance(seed)).kept.tolist() == [False, True] * 3
    stats = statistics(40)
    first, again, other = (rule(stats, tokens(40), chance(s)).kept for s in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_importance_weighted_sampling_is_unbiased() -> None:
    """App. A.3: the sum over kept tokens of g_t / p_t has mean sum g_t (one draw a try, p = h / sum h)."""
    h, g = torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([5.0, -1.0, 2.0, 0.5])
    generator, total, tries = chance(3), 0.0, 40_000
    for _ in range(tries):
        i = int(sampling_key(h, torch.rand(4, generator=generator)).argmax())
        total += float(g[i] / (h[i] / h.sum()))
    # variance of one draw: sum p (g/p)^2 - (sum g)^2 = 250 + 2.5 + 20 + 0.83 - 42.25 = 231.1 -> se 0.076
    assert abs(total / tries - float(g.sum())) < 4 * math.sqrt(231.1 / tries)


def test_chance_does_not_depend_on_the_order_of_micro_batches() -> None:
    where = tokens(3, 4)
    swapped = torch.tensor([3, 4, 5, 6, 0, 1, 2])
    other = Tokens(where.rollout[swapped], where.micro_batch[swapped], where.position[swapped])
    assert other.draws(chance()).equal(where.draws(chance())[swapped])


def test_random_keeps_the_budget_and_ignores_the_statistics() -> None:
    rule = selector(score="random", normalizer="none", retention=0.2)
    assert rule.reads == frozenset()
    kept = rule({}, tokens(50, 50), chance()).kept
    assert kept.sum() == 20 and kept[:50].sum() == 10
    assert not kept.equal(rule({}, tokens(50, 50), chance(1)).kept)


# --- normalisers and populations -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("minmax", [2.0, 4, 3], [0.0, 1, 0.5]),
        ("rank", [10.0, 30, 20], [0.0, 1, 0.5]),
        ("rank", [1.0, 1, 2], [0.25, 0.25, 1]),  # places 0 and 1 shared
        ("none", [2.0, 4, 3], [2.0, 4, 3]),
        ("minmax", [5.0, 5, 5], [0.0, 0, 0]),
        ("rank", [5.0, 5, 5], [0.0, 0, 0]),
        ("quantile", [5.0, 5, 5], [0.0, 0, 0]),
        ("minmax", [7.0], [0.0]),
        ("rank", [7.0], [0.0]),
        ("minmax", [], []),
    ],
)
def test_normalize(kind: str, values: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(normalize(torch.tensor(values), kind), torch.tensor(expected))


def test_quantile_normaliser_cuts_both_tails() -> None:
    values = torch.arange(101.0)  # 5th percentile 5, 95th 95
    found = normalize(values, "quantile")
    torch.testing.assert_close(found[[0, 5, 50, 95, 100]], torch.tensor([0.0, 0, 0.5, 1, 1]))


def test_clip_is_numpys_linear_quantile() -> None:
    values = torch.tensor([0.0, 1, 2, 100])  # place 0.5 * 3 = 1.5 -> 1.5; place 0.98 * 3 = 2.94 -> 2 + 0.94 * 98
    torch.testing.assert_close(clip_high(values, 0.5), torch.tensor([0.0, 1, 1.5, 1.5]))
    torch.testing.assert_close(clip_high(values, 0.98).max(), torch.tensor(2 + 0.94 * 98))
    assert clip_high(values, None).equal(values)


def test_population_is_what_min_and_max_are_taken_over() -> None:
    stats, where = {"entropy": torch.tensor([0.0, 1, 10, 20, 0, 100])}, tokens(2, 2, 2)
    score = lambda p: selector(score="entropy", normalize_over=p)(stats, where, chance()).score.tolist()  # noqa: E731
    assert score("rollout") == [0, 1, 0, 1, 0, 1]
    assert score("micro_batch") == [0, pytest.approx(1 / 20), 0.5, 1, 0, 1]  # rollouts 0 and 1 share a micro-batch
    assert score("batch") == pytest.approx([0, 0.01, 0.1, 0.2, 0, 1])


@given(st.integers(0, 50), st.sampled_from(["minmax", "quantile", "rank"]), st.sampled_from(["batch", "rollout"]))
def test_scores_stay_in_the_unit_interval_and_are_finite(seed: int, normalizer: str, normalize_over: str) -> None:
    for score in ("soft_or", "q3", "entropy", "reverse_kl"):
        found = selector(score=score, normalizer=normalizer, normalize_over=normalize_over)(
            statistics(30, seed), tokens(1, 9, 20), chance()
        ).score
        assert found.isfinite().all() and float(found.min()) >= 0 and float(found.max()) <= 1


def test_nothing_to_choose_from() -> None:
    for changes in (
        {},
        {"score": "q3"},
        {"score": "random", "normalizer": "none"},
        {"score": "full", "order": "positive"},
    ):
        chosen = selector(**changes)(statistics(0), tokens(), chance())
        assert chosen.kept.shape == (0,)


def test_one_token_per_rollout_is_kept_by_none_under_the_papers_floor() -> None:
    assert not selector()(statistics(3), tokens(1, 1, 1), chance()).kept.any()
    assert selector(rounding="at_least_one")(statistics(3), tokens(1, 1, 1), chance()).kept.all()


def test_all_equal_statistics_keep_the_earliest_tokens() -> None:
    stats = {name: torch.ones(6) for name in scores.STATISTICS}
    assert selector()(stats, tokens(6), chance()).kept.tolist() == [True] * 3 + [False] * 3


def test_nan_is_an_error_not_a_choice() -> None:
    stats = statistics(4)
    stats["reverse_kl"][2] = math.nan
    with pytest.raises(FloatingPointError, match="reverse_kl is not finite at 1 of 4 tokens"):
        selector()(stats, tokens(4), chance())


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
    """A confident right token (d = 0) and a confident wrong one (d = 9): equal to entropy, not to the others."""
    stats = {
        "entropy": torch.tensor([0.0, 0.0, 1.0]),
        "reverse_kl": torch.tensor([0.0, 9.0, 0.0]),
        "forward_kl": torch.tensor([0.0, 9.0, 0.0]),
    }
    by = {s: selector(score=s)(stats, tokens(3), chance()).score for s in ("entropy", "soft_or", "q3")}
    assert by["entropy"][0] == by["entropy"][1] == 0  # f(0) = 0: no weight for Q3, whatever its divergence
    assert by["soft_or"][1] > by["soft_or"][0] and by["q3"][1] > by["q3"][0]
    assert by["q3"].argmax() == 1


def test_quadrants_partition_the_tokens() -> None:
    stats = {"entropy": torch.tensor([0.5, 0.5, 0.1, 0.1, 0.3]), "reverse_kl": torch.tensor([0.5, 0.1, 0.5, 0.1, 0.3])}
    found = quadrants(stats, Quadrants(0.3, 0.3))
    assert {name: inside.nonzero().squeeze(-1).tolist() for name, inside in found.items()} == {
        "q1": [0, 4],  # at the cut is high
        "q2": [1],
        "q3": [2],
        "q4": [3],
    }
    for name, inside in found.items():
        score = "q3_quadrant" if name == "q3" else name
        assert selector(score=score, order="positive", normalizer="none")(stats, tokens(5), chance()).kept.equal(inside)


def test_every_rule_reads_only_statistics_that_can_be_measured() -> None:
    for name in scores.SCORES:
        assert scores.reads(name) <= set(scores.STATISTICS)
    assert scores.reads("soft_or") == {"entropy", "reverse_kl"}
    assert scores.reads("q3") == {"entropy", "forward_kl"}
    assert scores.reads("q1") == {"entropy", "reverse_kl"}
    assert scores.reads("full") == scores.reads("random") == frozenset()


# --- diagnostics -----------------------------------------------------------------------------------------------------


def test_token_metrics_of_a_small_step() -> None:
    stats = {"entropy": torch.tensor([1.0, 0, 0, 0]), "reverse_kl": torch.tensor([0.0, 3, 1, 0])}
    kept = torch.tensor([True, True, False, False])
    found = token_metrics(stats, tokens(4), Selection(kept, torch.tensor([1.0, 0.5, 0.25, 0])), selector())
    assert found["score/entropy_mean"] == 0.25
    assert found["quadrant/q3_share"] == 0.5 and found["quadrant/q3_kept_frac"] == 0.5
    assert found["quadrant/q3_divergence_share"] == 1.0 and found["quadrant/q1_share"] == 0.0
    assert found["quadrant/q1_kept_frac"] == 0.0  # an empty quadrant is 0, not NaN
    # entropy top half of 4, ties to the earlier: tokens 0 and 1 -> the same set
    assert found["select/overlap_entropy"] == 1.0
    assert found["select/score_at_0_15"] == pytest.approx(1.75 / 4)
    assert token_metrics({}, tokens(), Selection(kept[:0], kept[:0].float()), selector()) == {}


def test_jaccard() -> None:
    a, b = torch.tensor([True, True, False]), torch.tensor([False, True, True])
    assert jaccard(a, b) == pytest.approx(1 / 3)
    assert jaccard(a & False, b & False) == 1.0


def test_soft_selection_weighs_kept_tokens_by_their_score() -> None:
    """Entropies 0, 1, 3, 4 to scores 0, .25, .75, 1; of two kept the mass is 0.75 + 1, not 2."""
    stats, four = {"entropy": torch.tensor([0.0, 3.0, 4.0, 1.0])}, tokens(4)
    hard = selector(score="entropy")(stats, four, chance())
    soft = selector(score="entropy", weight_by_score=True)(stats, four, chance())
    assert hard.weights is None and hard.mass == 2.0
    assert soft.kept.tolist() == hard.kept.tolist() == [False, True, True, False]
    assert soft.weights is not None and soft.weights.tolist() == [0.0, 0.75, 1.0, 0.25]
    assert soft.mass == 1.75


def test_soft_selection_where_nothing_stands_out_has_no_mass() -> None:
    soft = selector(score="entropy", weight_by_score=True)({"entropy": torch.ones(4)}, tokens(4), chance())
    assert soft.mass == 0.0  # all scores are 0: the step is skipped, not divided by zero
