"""The report's statistics against scipy and statsmodels on the same data, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import anova_variances

from benchmarks.coverage import simulate
from tip_exp.report.significance import ArmScores, Estimate, compare, estimate, holm

scipy_stats = pytest.importorskip("scipy.stats")
multitest = pytest.importorskip("statsmodels.stats.multitest")
weightstats = pytest.importorskip("statsmodels.stats.weightstats")


def arm_of(scores: np.ndarray, seeds: tuple[int, ...] | None = None) -> ArmScores:
    scores = np.atleast_2d(scores)
    return ArmScores(tuple(f"p{i}" for i in range(scores.shape[1])), scores, seeds or tuple(range(len(scores))))


def difference_of(arm: ArmScores, baseline: ArmScores) -> Estimate:
    difference = compare(arm, baseline)
    assert difference, "the arms have the same problems"
    return difference


def random_arms(seeds: int, problems: int, shift: float, seed: int = 0) -> tuple[ArmScores, ArmScores]:
    """An arm and a baseline on problems of the same difficulty; each score is the mean of 4 graded responses."""
    rng = np.random.default_rng(seed)
    easiness = rng.beta(2, 1, size=problems)
    scores = rng.binomial(4, np.clip(easiness + shift, 0, 1), size=(seeds, problems)) / 4
    return arm_of(scores), arm_of(rng.binomial(4, easiness, size=(seeds, problems)) / 4)


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.1])
def test_with_one_seed_the_interval_is_that_of_the_paired_t_test_over_problems_and_there_is_no_p(shift: float) -> None:
    arm, baseline = random_arms(1, 200, shift)
    difference = difference_of(arm, baseline)
    expected = scipy_stats.ttest_rel(arm.scores[0], baseline.scores[0]).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert not difference.over_seeds and math.isnan(difference.p) and math.isnan(difference.margin)


def test_one_seed_on_either_side_leaves_the_seeds_out() -> None:
    (one, three), (_, baseline) = (random_arms(1, 50, 0.1)[0], random_arms(3, 50, 0.1)[0]), random_arms(3, 50, 0.1)
    for arm, full in ((one, baseline), (baseline, one)):
        difference = difference_of(arm, full)
        by_problem = arm.scores.mean(0) - full.scores.mean(0)
        assert difference.se == pytest.approx(scipy_stats.sem(by_problem))
        assert not difference.over_seeds and math.isnan(difference.p)
    assert difference_of(three, baseline).over_seeds


scores = st.tuples(st.integers(2, 5), st.integers(2, 12), st.integers(0, 10_000)).map(
    lambda sizes: np.random.default_rng(sizes[2]).integers(0, 5, size=sizes[:2]) / 4
)


@given(scores)
def test_the_variance_is_that_of_the_two_way_analysis_of_variance(table: np.ndarray) -> None:
    seeds, problems = table.shape
    v_problems, v_seeds, v_residual = anova_variances(table.tolist())
    result = estimate(table)
    variance = max(v_problems + v_seeds - v_residual, v_problems, v_seeds)
    assert result.mean == pytest.approx(table.mean()) and result.over_seeds
    assert result.se**2 == pytest.approx(variance, abs=1e-12)
    spread = v_problems**2 / (problems - 1) + v_seeds**2 / (seeds - 1)
    spread += v_residual**2 / ((seeds - 1) * (problems - 1))
    if spread > 1e-12:
        assert result.df == pytest.approx(max(variance**2 / spread, min(problems, seeds) - 1), rel=1e-6)


@given(scores)
def test_an_arm_equals_itself_and_the_sign_turns_with_the_sides(table: np.ndarray) -> None:
    arm, shifted = arm_of(table), arm_of(table + np.linspace(0, 1, table.size).reshape(table.shape))
    same = difference_of(arm, arm)
    assert (same.mean, same.se, same.p, same.margin) == (0, 0, 1, 0)
    forth, back = difference_of(shifted, arm), difference_of(arm, shifted)
    assert (forth.mean, forth.low, forth.p) == pytest.approx((-back.mean, -back.high, back.p))


def test_seeds_alone_give_a_t_test_over_seeds_paired_or_welchs() -> None:
    """Problems without scatter, so that only the scatter of three seeds is left."""
    by_seed = np.array([0.60, 0.66, 0.63])
    arm, baseline = arm_of(np.repeat(by_seed[:, None], 50, 1)), arm_of(np.full((3, 50), 0.5))
    difference = difference_of(arm, baseline)
    paired = scipy_stats.ttest_1samp(by_seed - 0.5, 0)
    interval = paired.confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert difference.p == pytest.approx(paired.pvalue)
    unpaired = difference_of(arm_of(arm.scores, seeds=(7, 8, 9)), arm_of(np.repeat([[0.5], [0.52], [0.48]], 50, 1)))
    welch = scipy_stats.ttest_ind(by_seed, [0.5, 0.52, 0.48], equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert (unpaired.low, unpaired.high) == pytest.approx((interval.low, interval.high))
    assert unpaired.p == pytest.approx(welch.pvalue)


def test_pairs_of_seeds_are_matched_by_number() -> None:
    """A seed's effect of 0.2 on both arms is no difference; as unpaired seeds it is scatter."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, size=(2, 3, 40))
    effects = np.array([[0.0], [0.2], [0.4]])
    arm, baseline = arm_of(noise[0] + effects), arm_of((noise[1] + effects)[::-1], seeds=(2, 1, 0))
    assert difference_of(arm, baseline).se < 0.003
    assert difference_of(arm, arm_of(baseline.scores, seeds=(3, 4, 5))).se > 0.1


def test_the_margin_is_that_of_two_one_sided_tests() -> None:
    """At the margin, the larger of the two one-sided p is 5 %."""
    by_seed = np.array([0.010, 0.018, 0.002, 0.013])
    difference = estimate(np.repeat(by_seed[:, None], 30, 1))
    p, *_ = weightstats.DescrStatsW(by_seed).ttost_mean(-difference.margin, difference.margin)
    assert p == pytest.approx(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("effect", [0.0, 3.0])
@pytest.mark.parametrize(("seeds", "widest"), [(2, 14.0), (3, 8.0), (5, 5.2), (10, 3.7)])
def test_coverage(effect: float, seeds: int, widest: float, paired: bool) -> None:
    """1,000 experiments: the simulation's standard error is 0.007. False alarms are 1 - coverage at no difference."""
    for seed_sd in (0.0, 1.0):
        shares = simulate(effect, seed_sd, seeds, 1000, paired=paired)
        assert 0.935 <= shares["report"] <= 0.99, shares
        assert shares["report_width"] < widest
        assert effect or shares["p_below"] == pytest.approx(1 - shares["report"])
        assert not effect or shares["within"] <= 0.05  # a false statement of equivalence within 2 points
    assert simulate(effect, 3.0, seeds, 1000, paired=paired)["report"] >= {2: 0.86, 3: 0.90, 5: 0.92, 10: 0.92}[seeds]


@pytest.mark.slow
def test_one_seed_cannot_give_a_p() -> None:
    """Intervals over problems of two students that differ by 0 on average miss 0 far too often if seeds scatter."""
    assert 0.93 <= simulate(0.0, 0.0, 1, 1000)["report"] <= 0.97
    assert simulate(0.0, 1.0, 1, 1000)["report"] < 0.90
    assert simulate(0.0, 3.0, 1, 1000)["report"] < 0.65


def test_problems_are_matched_by_name_and_must_be_the_same() -> None:
    arm = ArmScores(("a", "b"), np.array([[1.0, 0.0], [1.0, 0.0]]), (0, 1))
    reversed_arm = ArmScores(("b", "a"), np.array([[0.0, 1.0], [0.0, 1.0]]), (0, 1))
    assert difference_of(arm, reversed_arm).p == 1.0 and difference_of(arm, reversed_arm).high == 0.0
    assert compare(arm, ArmScores(("a", "c"), np.array([[1.0, 0.0]]), (0,))) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    expected = multitest.multipletests(p_values, method="holm")[1]
    assert holm(p_values) == pytest.approx(list(expected))


def test_holm_by_hand_and_with_missing_tests() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    first, missing, last = holm([0.01, math.nan, 0.04])
    assert (first, last) == pytest.approx((0.02, 0.04)) and math.isnan(missing)
