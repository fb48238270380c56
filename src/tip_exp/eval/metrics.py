"""Accuracy metrics over graded responses: mean@k with its standard error, pass@k, maj@k, best@k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Graded:
    """One response to one problem, graded."""

    problem_id: str
    sample: int
    answer: str
    text: str
    right: bool
    extracted: str | None
    rule: str
    strict_right: bool  # what the base code's string comparison says
    truncated: bool
    num_tokens: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


def summarize(graded: list[list[Graded]]) -> dict[str, float]:
    """mean@k, its standard error over problems, pass@k, maj@k, and how the responses look.

    The problems are what was sampled from the world, so the standard error is over their means: k responses to one
    problem are not k independent items. Needs two problems, for one has no standard error.
    """
    k = len(graded[0])
    right = np.array([[one.right for one in of_problem] for of_problem in graded], dtype=float)
    flat = [one for of_problem in graded for one in of_problem]
    return {
        f"mean@{k}": float(right.mean()),
        f"mean@{k}_se": standard_error(right.mean(axis=1)),
        f"pass@{k}": float(np.mean([pass_at_k(k, int(row.sum()), k) for row in right])),
        f"maj@{k}": float(np.mean([majority_is_right(of_problem) for of_problem in graded])),
        f"strict_mean@{k}": float(np.mean([one.strict_right for one in flat])),
        "strict_agreement": float(np.mean([one.strict_right == one.right for one in flat])),
        "response_len": float(np.mean([one.num_tokens for one in flat])),
        "truncated_frac": float(np.mean([one.truncated for one in flat])),
        "unparsed_frac": float(np.mean([one.extracted is None for one in flat])),
    }


def standard_error(values: np.ndarray) -> float:
    """Standard deviation (n - 1) over the square root of n; n of at least 2."""
    assert len(values) > 1, "the config asks for two problems"
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased chance that k of n responses, drawn without replacement, hold a right one (Chen et al. 2021, Codex)."""
    return 1.0 if n - right < k else 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_is_right(of_problem: list[Graded]) -> bool:
    """Is the most frequent extracted answer right? Ties go to the earliest; responses without an answer do not vote."""
    votes = Counter(one.extracted for one in of_problem if one.extracted is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]  # Counter keeps the order of first appearance among equals
    return next(one.right for one in of_problem if one.extracted == winner)


def best_at_k(scores: Sequence[Sequence[float]]) -> float:
    """Mean over tasks of the best of the k samples."""
    return _mean([max(samples) for samples in scores])


def best_at_k_bootstrap(scores: Sequence[Sequence[float]]) -> float:
    """Mean over tasks of the expected best of k draws with replacement from the task's k samples.

    This is what verl reports as best@k/mean, there from 1,000 random draws, here exactly. Sorted upwards, the i-th of
    k samples is the best of the draws with probability (i/k)^k - ((i-1)/k)^k. It lies below best_at_k, as a given
    sample is drawn at all with probability 1 - (1 - 1/k)^k only, 64 % for k = 16.
    """

    def expected(samples: Sequence[float]) -> float:
        k = len(samples)
        chances = (((i + 1) / k) ** k - (i / k) ** k for i in range(k))
        return sum(value * chance for value, chance in zip(sorted(samples), chances, strict=True))

    return _mean([expected(samples) for samples in scores])


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("a mean needs at least one score; got none")
    return sum(values) / len(values)
