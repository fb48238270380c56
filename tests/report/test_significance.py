"""The report's statistics against scipy and statsmodels on the same rows, and against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tip_exp.report.significance import Arm, compare, holm, standard_error, two_sided_p

scipy_stats = pytest.importorskip("scipy.stats")
multitest = pytest.importorskip("statsmodels.stats.multitest")
smf = pytest.importorskip("statsmodels.formula.api")


def arm(scores: np.ndarray, seeds: tuple[int, ...] | None = None) -> Arm:
    scores = np.atleast_2d(scores)
    return Arm(tuple(f"p{i}" for i in range(scores.shape[1])), scores, seeds or tuple(range(len(scores))))


def arms(seeds: int, problems: int, shift: float, seed: int = 0) -> tuple[Arm, Arm]:
    """Two arms whose problems have difficulties in common; each score is the mean of 4 graded responses."""
    rng = np.random.default_rng(seed)
    easy = rng.beta(2, 1, size=problems)
    ours = rng.binomial(4, np.clip(easy + shift, 0, 1), size=(seeds, problems)) / 4
    return arm(ours), arm(rng.binomial(4, easy, size=(seeds, problems)) / 4)


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.1])
def test_interval_is_scipys_paired_percentile_bootstrap(shift: float) -> None:
    ours, base = arms(1, 200, shift)
    found = compare(ours, base)
    their = scipy_stats.bootstrap(
        (ours.scores[0], base.scores[0]), lambda a, b, axis: a.mean(axis) - b.mean(axis), paired=True,
        vectorized=True, n_resamples=10_000, method="percentile", rng=np.random.default_rng(5),
    )  # fmt: skip
    width = their.confidence_interval.high - their.confidence_interval.low
    assert found.mean == pytest.approx(float(ours.scores.mean() - base.scores.mean()))
    assert found.low == pytest.approx(their.confidence_interval.low, abs=0.03 * width)
    assert found.high == pytest.approx(their.confidence_interval.high, abs=0.03 * width)
    assert not found.with_seeds and found.num_problems == 200


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.05])
def test_p_is_that_of_the_paired_t_test_and_of_the_permutation_test_when_there_are_many_problems(shift: float) -> None:
    ours, base = arms(1, 400, shift, seed=3)
    difference = ours.scores[0] - base.scores[0]
    found = compare(ours, base).p
    flips = scipy_stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=5_000, vectorized=False,
        rng=np.random.default_rng(2),
    )  # fmt: skip
    assert found == pytest.approx(scipy_stats.ttest_1samp(difference, 0).pvalue, abs=0.03)
    assert found == pytest.approx(flips.pvalue, abs=0.06)  # counts ties, which 400 scores in quarters have many of


def test_the_cluster_is_the_problem_as_in_statsmodels_clustered_errors() -> None:
    """3 seeds x 2 responses x 150 problems as rows; least squares of right on arm, errors clustered by problem."""
    rng = np.random.default_rng(0)
    easy = rng.beta(1, 1, size=150)
    right = {name: rng.binomial(1, easy, size=(3, 2, 150)) for name in ("base", "ours")}
    rows = [
        {"arm": int(name == "ours"), "problem": p, "right": value}
        for name, values in right.items()
        for (_, _, p), value in np.ndenumerate(values)
    ]
    frame = pd.DataFrame(rows)
    fit = smf.ols("right ~ arm", frame).fit(cov_type="cluster", cov_kwds={"groups": frame["problem"]})
    found = compare(arm(right["ours"].mean(1)), arm(right["base"].mean(1)), over_seeds=False)
    assert found.mean == pytest.approx(fit.params["arm"])
    low, high = fit.conf_int().loc["arm"]
    # the interval that takes 900 responses for independent is wider here, for pairing is what cancels difficulty
    assert (found.high - found.low) == pytest.approx(high - low, rel=0.04)
    assert found.p == pytest.approx(fit.pvalues["arm"], abs=0.03)


def test_scatter_between_seeds_widens_the_interval_by_what_a_t_test_over_seeds_says() -> None:
    """Problems without any scatter: what is left is the paired t-test over three seeds."""
    by_seed = np.array([0.60, 0.66, 0.63])
    ours, base = arm(np.repeat(by_seed[:, None], 50, 1)), arm(np.full((3, 50), 0.5))
    assert compare(ours, base, over_seeds=False).high == pytest.approx(0.13)  # 0.63 - 0.50, for these three students
    found = compare(ours, base)
    their = scipy_stats.ttest_1samp(by_seed - 0.5, 0).confidence_interval(0.95)
    assert found.with_seeds
    assert (found.low, found.high) == pytest.approx((their.low, their.high), abs=0.008)
    unpaired = compare(arm(ours.scores, seeds=(7, 8, 9)), arm(np.repeat([[0.5], [0.52], [0.48]], 50, 1)))
    welch = scipy_stats.ttest_ind(by_seed, [0.5, 0.52, 0.48], equal_var=False).confidence_interval(0.95)
    assert (unpaired.low, unpaired.high) == pytest.approx((welch.low, welch.high), abs=0.008)


def test_intervals_hold_what_they_promise_when_seeds_scatter() -> None:
    """300 experiments without any true difference: seeds scatter by 0.05, problems by their own difficulty.

    Problems alone miss the seeds' scatter (coverage far below 0.95); with it, at least 0.95 within 2 errors of 0.0126.
    """
    rng = np.random.default_rng(1)
    inside = {True: 0, False: 0}
    for _ in range(300):
        easy = rng.uniform(0.2, 0.8, size=100)
        drawn = [
            rng.binomial(4, np.clip(easy + rng.normal(0, 0.05, size=(3, 1)), 0, 1), size=(3, 100)) / 4 for _ in range(2)
        ]
        for over_seeds in inside:
            found = compare(arm(drawn[0]), arm(drawn[1]), over_seeds=over_seeds, resamples=1000)
            inside[over_seeds] += found.low <= 0 <= found.high
    assert inside[False] < 0.75 * 300
    assert inside[True] >= 0.925 * 300


def test_problems_are_matched_by_name_and_must_be_the_same() -> None:
    ours = Arm(("a", "b"), np.array([[1.0, 0.0]]), (0,))
    turned = Arm(("b", "a"), np.array([[0.0, 1.0]]), (0,))
    assert compare(ours, turned).p == 1.0 and compare(ours, turned).high == 0.0
    with pytest.raises(ValueError, match="2 were asked of one arm alone, such as b"):
        compare(ours, Arm(("a", "c"), np.array([[1.0, 0.0]]), (0,)))
    with pytest.raises(ValueError, match=r"1 seeds on 2 problems cannot be \(1, 3\)"):
        Arm(("a", "b"), np.zeros((1, 3)), (0,))


def test_the_same_rows_give_the_same_figures() -> None:
    assert compare(*arms(2, 50, 0.1)) == compare(*arms(2, 50, 0.1))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    expected = multitest.multipletests(p_values, method="holm")[1]
    assert holm(p_values) == pytest.approx(list(expected))


def test_holm_by_hand_and_with_gaps() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    got = holm([0.01, math.nan, 0.04])
    assert (got[0], got[2]) == pytest.approx((0.02, 0.04)) and math.isnan(got[1])


def test_p_counts_the_draws_on_the_far_side() -> None:
    # 1 of 99 draws is below 0: 2 x (1 + 1) / (1 + 99)
    assert two_sided_p(np.array([-1.0] + [1.0] * 98)) == pytest.approx(0.04)
    assert two_sided_p(np.zeros(9)) == 1.0


def test_standard_error_is_over_seeds_if_there_are_several() -> None:
    scores = np.array([[0.0, 1.0], [1.0, 1.0]])
    assert standard_error(arm(scores)) == pytest.approx(0.25)  # 0.5 and 1.0: 0.3536 / sqrt 2
    assert standard_error(arm(scores[0])) == pytest.approx(0.5)  # 0 and 1: 0.7071 / sqrt 2
