"""Accuracy metrics, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import expected_maximum_of_draws

from tip_exp.eval.metrics import (
    Graded,
    best_at_k,
    best_at_k_bootstrap,
    majority_is_right,
    pass_at_k,
    standard_error,
    summarize,
)


def graded(extracted: str | None, right: bool, sample: int = 0, **changes) -> Graded:
    fields = {
        "problem_id": "p",
        "sample": sample,
        "answer": "9",
        "text": "",
        "rule": "boxed",
        "truncated": False,
        "strict_right": right,
    }
    return Graded(extracted=extracted, right=right, num_tokens=10, **{**fields, **changes})


def test_summary_of_two_problems() -> None:
    # problem 1: 9 9 8, 2/3 right, majority right; problem 2: 7 - 9, 1/3 right, the tie goes to 7, which is wrong
    rows = [
        [graded("9", True), graded("9", True), graded("8", False)],
        [graded("7", False), graded(None, False, truncated=True), graded("9", True)],
    ]
    summary = summarize(rows)
    assert summary["mean@3"] == pytest.approx(0.5)
    # the deviations from the mean are ±1/6: std = sqrt(2 (1/6)² / 1) = sqrt(2)/6, over sqrt(2) is 1/6
    assert summary["mean@3_se"] == pytest.approx(1 / 6)
    assert summary["pass@3"] == 1.0 and summary["maj@3"] == 0.5
    assert summary["unparsed_frac"] == summary["truncated_frac"] == pytest.approx(1 / 6)
    assert summary["response_len"] == 10


def test_standard_error_is_over_problems_not_responses() -> None:
    """16 equal responses to each of two problems are 2 independent samples, not 32."""
    rows = [[graded("9", True)] * 16, [graded("8", False)] * 16]
    assert summarize(rows)["mean@16_se"] == pytest.approx(0.5)  # std([1, 0]) = 0.7071, over sqrt(2)
    assert standard_error(np.array([1.0, 1.0, 1.0])) == 0.0


@pytest.mark.parametrize(
    ("n", "num_right", "k", "expected"), [(4, 0, 2, 0.0), (4, 4, 2, 1.0), (4, 1, 2, 0.5), (4, 3, 2, 1.0)]
)
def test_pass_at_k(n: int, num_right: int, k: int, expected: float) -> None:
    assert pass_at_k(n, num_right, k) == pytest.approx(expected)  # 1 right of 4, 2 drawn: 1 - C(3,2)/C(4,2) = 0.5


def test_majority_without_votes_is_wrong() -> None:
    assert not majority_is_right([graded(None, False), graded(None, False)])


def test_best_at_k_is_the_mean_of_the_tasks_maxima() -> None:
    assert best_at_k([[0.2, 0.6], [1.0, 0.0]]) == pytest.approx(0.8)  # (0.6 + 1.0) / 2


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=3))
def test_bootstrap_best_at_k_is_the_mean_over_all_draws(scores: list[list[float]]) -> None:
    expected = [expected_maximum_of_draws(samples) for samples in scores]
    assert best_at_k_bootstrap(scores) == pytest.approx(sum(expected) / len(expected))


def test_best_at_k_of_no_task_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one score; got none"):
        best_at_k([])
