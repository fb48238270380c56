"""Accuracy metrics, by hand."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import expected_maximum_of_draws, majority, pass_by_subsets

from tip_exp.envs.episodes import Episode, Stop
from tip_exp.eval.metrics import (
    Graded,
    best_at_k,
    best_at_k_bootstrap,
    majority_is_right,
    pass_at_j,
    repetition_rate,
    summarize,
    summarize_episodes,
)
from tip_exp.grading.groups import group
from tip_exp.types import Rollout


def by_value(answer_lists: Iterable[list[str]]) -> list[list[int]]:
    return [
        group(answers, lambda a, b: "same" if Fraction(a) == Fraction(b) else "different") for answers in answer_lists
    ]


def graded(extracted: str | None, right: bool, sample: int = 0, **changes) -> Graded:
    fields = {
        "problem_id": "p",
        "sample": sample,
        "answer": "9",
        "text": "",
        "rule": "boxed",
        "truncated": False,
        "strict_right": right,
        "repetition": 0.0,
    }
    return Graded(extracted=extracted, right=right, num_tokens=10, **{**fields, **changes})


def test_summary_of_two_problems() -> None:
    # problem 1: 9 9 8, 2/3 right, majority right; problem 2: 7 - 9, 1/3 right, the tie goes to 7, which is wrong
    rows = [
        [graded("9", True), graded("9", True), graded("8", False)],
        [graded("7", False), graded(None, False, truncated=True), graded("9", True, strict_right=False)],
    ]
    summary = summarize(rows, by_value)
    assert summary["mean@3"] == pytest.approx(0.5)
    # the deviations from the mean are ±1/6: std = sqrt(2 (1/6)² / 1) = sqrt(2)/6, over sqrt(2) is 1/6
    assert summary["mean@3_se"] == pytest.approx(1 / 6)
    assert summary["pass@3"] == 1.0 and summary["maj@3"] == 0.5
    assert summary["unparsed_frac"] == summary["truncated_frac"] == pytest.approx(1 / 6)
    # the string grader misses the last 9: 2 of 6 right, the same verdict for 5 of 6
    assert summary["strict_mean@3"] == pytest.approx(2 / 6) and summary["strict_agreement"] == pytest.approx(5 / 6)
    assert summary["response_len"] == 10


def test_standard_error_is_over_problems_not_responses() -> None:
    """16 equal responses to each of two problems are 2 independent samples, not 32."""
    rows = [[graded("9", True)] * 16, [graded("8", False)] * 16]
    summary = summarize(rows, by_value)
    assert summary["mean@16_se"] == pytest.approx(0.5)  # std([1, 0]) = 0.7071, over sqrt(2)
    assert summary["pass@16"] == 0.5
    assert summarize([rows[0]] * 3, by_value)["mean@16_se"] == 0.0


def test_pass_curve_strata_and_ungraded_responses() -> None:
    # problem 1: 1 of 4 right, and that one is truncated; problem 2: 2 of 4 right
    rows = [
        [graded("9", True, truncated=True, repetition=0.8), *[graded("8", False)] * 3],
        [graded("9", True), graded("9", True), graded("8", False, rule="timeout"), graded(None, False, truncated=True)],
    ]
    summary = summarize(rows, by_value)
    # pass@2: 1 - C(3, 2) / C(4, 2) = 1/2, 1 - C(2, 2) / C(4, 2) = 5/6; their mean is 2/3
    assert [summary[f"pass@{j}"] for j in (1, 2, 4)] == [pytest.approx(x) for x in (3 / 8, 2 / 3, 1)]
    assert "pass@3" not in summary and summary["pass@1"] == summary["mean@4"]
    assert summary["finished_accuracy"] == pytest.approx(2 / 6) and summary["truncated_accuracy"] == 1 / 2
    assert summary["ungraded_frac"] == 1 / 8 and summary["repetition_rate"] == pytest.approx(0.1)


def test_a_stratum_without_responses_has_no_accuracy() -> None:
    summary = summarize([[graded("9", True)]] * 2, by_value)
    assert summary["finished_accuracy"] == 1 and "truncated_accuracy" not in summary


@given(st.data(), st.integers(1, 6))
def test_pass_at_j_is_the_mean_over_all_subsets(data: st.DataObject, k: int) -> None:
    j, right = data.draw(st.integers(1, k)), data.draw(st.lists(st.booleans(), min_size=k, max_size=k))
    assert pass_at_j([sum(right)], k, j) == pytest.approx(pass_by_subsets(right, j))


def test_repetition_rate_counts_distinct_4_grams() -> None:
    assert repetition_rate([1, 2, 1, 2, 1, 2, 1]) == 0.5  # 1212, 2121, 1212, 2121: 2 distinct of 4
    assert repetition_rate([1, 2, 3, 1, 2, 3]) == 0.0  # no 4-gram occurs twice
    assert repetition_rate([7] * 11) == 1 - 1 / 8
    assert repetition_rate([7] * 3) == 0.0


def majority_of(answers: str, right: str) -> bool:
    responses = [graded(answer, Fraction(answer) == Fraction(right)) for answer in answers.split()]
    return majority_is_right([responses], by_value)[0]


def test_majority_counts_values_not_strings() -> None:
    assert majority_of("3 3 1/2 0.5 2/4", right="1/2")  # three strings with one value
    assert not majority_of("9 9 5 5.0 10/2", right="9")
    assert majority_of("9 9 5 6 7", right="9")  # three wrong answers of three values
    assert majority_of("9 5 5.0 9", right="9") and not majority_of("5 9 9 5.0", right="9")  # ties: the earliest


@given(st.lists(st.sampled_from(["1", "1.0", "2/2", "2", "4/2", "3", "6/2", "3.0"]), min_size=1, max_size=9))
def test_majority_is_that_of_the_values(answers: list[str]) -> None:
    assert majority_of(" ".join(answers), right="2") == (majority([Fraction(answer) for answer in answers]) == 2)


def test_votes_without_a_value() -> None:
    ungraded = [graded("x", False, rule="timeout"), graded("y", False, rule="timeout")]
    problems = [
        [graded(None, False), graded(None, False)],  # no votes
        [graded(None, False), graded(None, False), graded("9", True)],  # unparsed responses do not vote
        [*ungraded, graded("9", True), graded("9", True)],  # not one value: two votes each one for x and y
        [*ungraded, ungraded[0], graded("9", True)],
    ]
    assert majority_is_right(problems, by_value) == [False, True, True, False]


def test_answers_are_compared_only_where_the_winner_is_open() -> None:
    def refuse(answer_lists: Iterable[list[str]]) -> list[list[int]]:
        assert not list(answer_lists)
        return []

    problems = [[graded("9", True), graded("9", True), graded("8", False)], [graded("8", False), graded("7", False)]]
    assert majority_is_right(problems, refuse) == [True, False]


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
