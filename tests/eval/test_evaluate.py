"""Evaluation: sampled responses are matched with their problems and graded."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tip_exp.eval.evaluate import evaluate
from tip_exp.eval.metrics import Graded, majority_is_right, pass_at_k, standard_error, summarize
from tip_exp.grading import boxed
from tip_exp.types import Problem, Rollout, Sampling


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
    # problem 1: 9 9 8 -> 2/3, majority right; problem 2: 7 - 9 -> 1/3, 7 came first among equals
    rows = [
        [graded("9", True), graded("9", True), graded("8", False)],
        [graded("7", False), graded(None, False, truncated=True), graded("9", True)],
    ]
    found = summarize(rows)
    assert found["mean@3"] == pytest.approx(0.5)
    assert found["mean@3_se"] == pytest.approx(np.std([2 / 3, 1 / 3], ddof=1) / math.sqrt(2))
    assert found["pass@3"] == 1.0 and found["maj@3"] == 0.5
    assert found["unparsed_frac"] == found["truncated_frac"] == pytest.approx(1 / 6)
    assert found["response_len"] == 10


def test_standard_error_is_over_problems_not_responses() -> None:
    """16 equal responses to each of two problems are two items, not 32."""
    rows = [[graded("9", True)] * 16, [graded("8", False)] * 16]
    assert summarize(rows)["mean@16_se"] == pytest.approx(0.5)  # std([1, 0]) = 0.7071, over sqrt(2)
    assert standard_error(np.array([1.0, 1.0, 1.0])) == 0.0


@pytest.mark.parametrize(
    ("n", "right", "k", "expected"), [(4, 0, 2, 0.0), (4, 4, 2, 1.0), (4, 1, 2, 0.5), (4, 3, 2, 1.0)]
)
def test_pass_at_k(n: int, right: int, k: int, expected: float) -> None:
    assert pass_at_k(n, right, k) == pytest.approx(expected)  # 1 right of 4, 2 drawn: 1 - C(3,2)/C(4,2) = 0.5


def test_majority_without_votes_is_wrong() -> None:
    assert not majority_is_right([graded(None, False), graded(None, False)])


@pytest.mark.parametrize(
    ("text", "right", "extracted"),
    [
        ("so \\boxed{29}", True, "29"),
        ("\\boxed{3} then \\boxed{29}", True, "29"),
        ("\\boxed{29} then \\boxed{3}", False, "3"),
        ("\\boxed{029}", True, "029"),
        ("\\boxed{ 29 }", True, "29"),
        ("29", False, None),
        ("\\boxed{}", False, None),
        ("\\boxed{2", False, None),
        ("", False, None),
    ],
)
def test_boxed_integers(text: str, right: bool, extracted: str | None) -> None:
    verdict = boxed.grade(text, "29")
    assert (verdict.right, verdict.extracted) == (right, extracted)
    assert verdict.rule == ("unparsed" if extracted is None else "boxed")


def test_evaluate_matches_responses_to_their_problems() -> None:
    class Echo:
        """Answers every prompt with its own last id, then its sample's number."""

        def generate(self, prompts, sampling, seed):
            return [
                Rollout([*p, p[-1] + j], [False] * len(p) + [True], "stop", [])
                for p in prompts
                for j in range(sampling.samples)
            ]

        def sync(self) -> None: ...
        def close(self) -> None: ...

    problems = [Problem("a", "", "5"), Problem("b", "", "8")]
    found = evaluate(
        Echo(), problems, [[1, 5], [1, 7]], Sampling(2, 1.0, 1.0, 0, 1), seed=0,
        decode=lambda ids: f"\\boxed{{{ids[0]}}}", grade_all=lambda pairs: [boxed.grade(*pair) for pair in pairs],
    )  # fmt: skip
    assert [[one.right for one in of_problem] for of_problem in found] == [[True, False], [False, True]]
    assert [one.problem_id for of_problem in found for one in of_problem] == ["a", "a", "b", "b"]
