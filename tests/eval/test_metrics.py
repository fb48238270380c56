"""Accuracy metrics, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import expected_maximum_of_draws

from tip_exp.envs.episodes import Episode, Stop
from tip_exp.eval.metrics import (
    Graded,
    best_at_k,
    best_at_k_bootstrap,
    majority_is_right,
    summarize,
    summarize_episodes,
)
from tip_exp.types import Rollout


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
    summary = summarize(rows)
    assert summary["mean@16_se"] == pytest.approx(0.5)  # std([1, 0]) = 0.7071, over sqrt(2)
    assert summary["pass@16"] == 0.5
    assert summarize([rows[0]] * 3)["mean@16_se"] == 0.0


def test_majority_without_votes_is_wrong() -> None:
    assert not majority_is_right([graded(None, False), graded(None, False)])


def test_best_at_k_is_the_mean_of_the_tasks_maxima() -> None:
    assert best_at_k([[0.2, 0.6], [1.0, 0.0]]) == pytest.approx(0.8)  # (0.6 + 1.0) / 2


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=3))
def test_bootstrap_best_at_k_is_the_mean_over_all_draws(scores: list[list[float]]) -> None:
    expected = [expected_maximum_of_draws(samples) for samples in scores]
    assert best_at_k_bootstrap(scores) == pytest.approx(sum(expected) / len(expected))


def episode(score: float, num_tokens: int = 2, stop: Stop = "final") -> Episode:
    finish = "stop" if stop == "final" else "length"
    rollout = Rollout([1] * (1 + num_tokens), [False] + [True] * num_tokens, finish, [])
    scores = {"fraction": score, "delivered": 1.0}
    return Episode(rollout, "", turns=3, calls=2, failed_calls=0, cut_observations=0, stop=stop, score=scores)


def test_summary_of_two_tasks() -> None:
    # task means 0.5 and 0.9; their standard error is 0.4 / sqrt(2) / sqrt(2) = 0.2
    by_task = [[episode(0.2), episode(0.8)], [episode(1.0, num_tokens=6, stop="turns"), episode(0.8)]]
    summary = summarize_episodes(by_task, no_tool_baseline=0.25)
    assert summary["mean@2"] == pytest.approx(0.7) and summary["mean@2_se"] == pytest.approx(0.2)
    assert summary["best@2"] == pytest.approx(0.9)  # (0.8 + 1.0) / 2
    assert summary["best@2_bootstrap"] == pytest.approx(0.8)  # (3/4 · 0.8 + 1/4 · 0.2 + 3/4 · 1.0 + 1/4 · 0.8) / 2
    assert summary["no_tool_baseline"] == 0.25 and summary["response_len"] == 3.0
    assert summary["truncated_frac"] == summary["stop_turns_frac"] == 0.25 and summary["stop_final_frac"] == 0.75
    assert (summary["fraction"], summary["delivered"], summary["turns"]) == (pytest.approx(0.7), 1.0, 3.0)
