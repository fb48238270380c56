"""The report's statistics against scipy and statsmodels on the same data, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tip_exp.report.significance import ArmScores, Difference, compare, holm, two_sided_p

scipy_stats = pytest.importorskip("scipy.stats")
multitest = pytest.importorskip("statsmodels.stats.multitest")
smf = pytest.importorskip("statsmodels.formula.api")


def arm_of(scores: np.ndarray, seeds: tuple[int, ...] | None = None) -> ArmScores:
    scores = np.atleast_2d(scores)
    return ArmScores(tuple(f"p{i}" for i in range(scores.shape[1])), scores, seeds or tuple(range(len(scores))))


def difference_of(arm: ArmScores, baseline: ArmScores) -> Difference:
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
def test_the_interval_is_scipys_paired_percentile_bootstrap(shift: float) -> None:
    arm, baseline = random_arms(1, 200, shift)
    difference = difference_of(arm, baseline)
    interval = scipy_stats.bootstrap(
        (arm.scores[0], baseline.scores[0]), lambda a, b, axis: a.mean(axis) - b.mean(axis), paired=True,
        vectorized=True, n_resamples=10_000, method="percentile", rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    width = interval.high - interval.low
    assert difference.mean == pytest.approx(float(arm.scores.mean() - baseline.scores.mean()))
    assert difference.low == pytest.approx(interval.low, abs=0.03 * width)
    assert difference.high == pytest.approx(interval.high, abs=0.03 * width)
    assert not difference.with_seeds


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.05])
def test_p_is_that_of_the_paired_t_test_and_the_permutation_test_for_many_problems(shift: float) -> None:
    arm, baseline = random_arms(1, 400, shift, seed=3)
    by_problem = arm.scores[0] - baseline.scores[0]
    p = difference_of(arm, baseline).p
    permutation = scipy_stats.permutation_test(
        (by_problem,), np.mean, permutation_type="samples", n_resamples=5_000, vectorized=False,
        rng=np.random.default_rng(2),
    )  # fmt: skip
    assert p == pytest.approx(scipy_stats.ttest_1samp(by_problem, 0).pvalue, abs=0.03)
    assert p == pytest.approx(permutation.pvalue, abs=0.06)  # it counts ties, which scores in quarters often have


def test_the_cluster_is_the_problem_as_in_statsmodels_clustered_errors() -> None:
    """3 seeds x 2 responses x 150 problems as rows; least squares of right on arm, errors clustered by problem."""
    rng = np.random.default_rng(0)
    easiness = rng.beta(1, 1, size=150)
    right = {is_arm: rng.binomial(1, easiness, size=(3, 2, 150)) for is_arm in (0, 1)}
    rows = [
        {"arm": is_arm, "problem": problem, "right": value}
        for is_arm, values in right.items()
        for (_, _, problem), value in np.ndenumerate(values)
    ]
    frame = pd.DataFrame(rows)
    fit = smf.ols("right ~ arm", frame).fit(cov_type="cluster", cov_kwds={"groups": frame["problem"]})
    difference = difference_of(arm_of(right[1].mean((0, 1))), arm_of(right[0].mean((0, 1))))  # the mean over seeds
    assert difference.mean == pytest.approx(fit.params["arm"])
    low, high = fit.conf_int().loc["arm"]
    assert (difference.high - difference.low) == pytest.approx(high - low, rel=0.04)
    assert difference.p == pytest.approx(fit.pvalues["arm"], abs=0.03)


def test_scatter_between_seeds_widens_the_interval_to_that_of_a_t_test_over_seeds() -> None:
    """Problems without scatter, so that only the scatter of three seeds is left."""
    by_seed = np.array([0.60, 0.66, 0.63])
    arm, baseline = arm_of(np.repeat(by_seed[:, None], 50, 1)), arm_of(np.full((3, 50), 0.5))
    over_problems = difference_of(arm_of(arm.scores.mean(0)), baseline)
    assert over_problems.high == pytest.approx(0.13)  # 0.63 - 0.50
    difference = difference_of(arm, baseline)
    paired = scipy_stats.ttest_1samp(by_seed - 0.5, 0).confidence_interval(0.95)
    assert difference.with_seeds
    assert (difference.low, difference.high) == pytest.approx((paired.low, paired.high), abs=0.008)
    unpaired = difference_of(arm_of(arm.scores, seeds=(7, 8, 9)), arm_of(np.repeat([[0.5], [0.52], [0.48]], 50, 1)))
    welch = scipy_stats.ttest_ind(by_seed, [0.5, 0.52, 0.48], equal_var=False).confidence_interval(0.95)
    assert (unpaired.low, unpaired.high) == pytest.approx((welch.low, welch.high), abs=0.008)


def test_coverage_when_seeds_scatter() -> None:
    """300 experiments without a true difference: seeds scatter by 0.05, problems by their own difficulty.

    Intervals over problems miss the seeds' scatter, so their coverage is far below 0.95. With it, coverage is at least
    0.95 minus two standard errors of 0.0126.
    """
    rng = np.random.default_rng(1)
    covered = {True: 0, False: 0}
    for _ in range(300):
        easiness = rng.uniform(0.2, 0.8, size=100)
        arm, baseline = (
            rng.binomial(4, np.clip(easiness + rng.normal(0, 0.05, size=(3, 1)), 0, 1), size=(3, 100)) / 4
            for _ in range(2)
        )
        for over_seeds in covered:
            sides = (arm, baseline) if over_seeds else (arm.mean(0), baseline.mean(0))
            difference = difference_of(*map(arm_of, sides))
            assert difference.with_seeds is over_seeds
            covered[over_seeds] += difference.low <= 0 <= difference.high
    assert covered[False] < 0.75 * 300
    assert covered[True] >= 0.925 * 300


def test_problems_are_matched_by_name_and_must_be_the_same() -> None:
    arm = ArmScores(("a", "b"), np.array([[1.0, 0.0]]), (0,))
    reversed_arm = ArmScores(("b", "a"), np.array([[0.0, 1.0]]), (0,))
    assert difference_of(arm, reversed_arm).p == 1.0 and difference_of(arm, reversed_arm).high == 0.0
    assert compare(arm, ArmScores(("a", "c"), np.array([[1.0, 0.0]]), (0,))) is None


def test_repeated_comparisons_give_the_same_numbers() -> None:
    assert difference_of(*random_arms(2, 50, 0.1)) == difference_of(*random_arms(2, 50, 0.1))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_that_of_statsmodels(p_values: list[float]) -> None:
    expected = multitest.multipletests(p_values, method="holm")[1]
    assert holm(p_values) == pytest.approx(list(expected))


def test_holm_by_hand_and_with_missing_tests() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    first, missing, last = holm([0.01, math.nan, 0.04])
    assert (first, last) == pytest.approx((0.02, 0.04)) and math.isnan(missing)


def test_p_counts_the_resamples_on_the_far_side() -> None:
    # 1 of 99 resamples is below 0: 2 x (1 + 1) / (1 + 99)
    assert two_sided_p(np.array([-1.0] + [1.0] * 98)) == pytest.approx(0.04)
    assert two_sided_p(np.zeros(9)) == 1.0
