"""Accuracy over k responses a problem: mean@k with its standard error, pass@k, maj@k, best@k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tip_exp.records.metrics import maj_at, mean_at, pass_at, standard_error_of


@dataclass(frozen=True, slots=True)
class Graded:
    """One graded response to one problem."""

    problem_id: str
    sample: int
    answer: str  # the reference answer
    text: str
    right: bool
    extracted: str | None
    rule: str
    strict_right: bool  # by the string comparison of the paper's base code
    truncated: bool
    num_tokens: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


def summarize(by_problem: list[list[Graded]]) -> dict[str, float]:
    """Metrics of k responses to each problem. Needs two problems, for the standard error.

    The standard error is over the problems' means: k responses to one problem are not k independent samples.
    """
    k = len(by_problem[0])
    right = np.array([[response.right for response in responses] for responses in by_problem], dtype=float)
    all_responses = [response for responses in by_problem for response in responses]
    return {
        mean_at(k): float(right.mean()),
        standard_error_of(mean_at(k)): standard_error(right.mean(axis=1)),
        pass_at(k): float(np.mean([pass_at_k(k, int(row.sum()), k) for row in right])),
        maj_at(k): float(np.mean([majority_is_right(responses) for responses in by_problem])),
        f"strict_{mean_at(k)}": float(np.mean([response.strict_right for response in all_responses])),
        "strict_agreement": float(np.mean([response.strict_right == response.right for response in all_responses])),
        "response_len": float(np.mean([response.num_tokens for response in all_responses])),
        "truncated_frac": float(np.mean([response.truncated for response in all_responses])),
        "unparsed_frac": float(np.mean([response.extracted is None for response in all_responses])),
    }


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean: sample standard deviation (n - 1) over sqrt(n); n ≥ 2."""
    assert len(values) > 1, "the config requires two problems"
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def pass_at_k(n: int, num_right: int, k: int) -> float:
    """Unbiased probability that k of n responses, drawn without replacement, include a right one.

    Chen et al. 2021 (Codex), Sec. 2.1; `num_right` of the n responses are right.
    """
    return 1.0 if n - num_right < k else 1.0 - math.comb(n - num_right, k) / math.comb(n, k)


def majority_is_right(responses: list[Graded]) -> bool:
    """Is the most frequent extracted answer right? The earliest wins a tie; unparsed responses do not vote."""
    votes = Counter(response.extracted for response in responses if response.extracted is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # Counter orders equal counts by first appearance
    return next(response.right for response in responses if response.extracted == winner)


def best_at_k(scores: Sequence[Sequence[float]]) -> float:
    """Mean over tasks of the maximum of the k samples; scores[task][sample]."""
    return _mean([max(samples) for samples in scores])


def best_at_k_bootstrap(scores: Sequence[Sequence[float]]) -> float:
    """Mean over tasks of the expected maximum of k draws with replacement from the task's k samples.

    This is verl's best@k/mean, computed exactly instead of from 1,000 random draws: of k samples in ascending order,
    the i-th is the maximum with probability (i/k)^k - ((i-1)/k)^k. It is below best_at_k, because a given sample is
    drawn with probability 1 - (1 - 1/k)^k only (64 % for k = 16).
    """

    def expected_maximum(samples: Sequence[float]) -> float:
        k = len(samples)
        probabilities = (((i + 1) / k) ** k - (i / k) ** k for i in range(k))
        return sum(value * probability for value, probability in zip(sorted(samples), probabilities, strict=True))

    return _mean([expected_maximum(samples) for samples in scores])


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("a mean needs at least one score; got none")
    return sum(values) / len(values)
