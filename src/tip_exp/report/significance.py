"""Is the difference between two selectors more than chance? Paired bootstrap over problems, with Holm's correction.

Two arms (all seeds of one selector at one retention) are compared on the same problems. The responses to one problem
are not independent, so their scores are averaged and the problem is the unit of resampling (a cluster). That covers
these trained students. To cover students of other seeds as well, the scatter between seeds is added if both arms have
two seeds or more, as a Student t with the few degrees of freedom that the seeds leave. Sampling noise is in both parts,
so the intervals are conservative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000  # the standard error of a p of 0.05 is then 0.002
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class ArmScores:
    """Mean score of each seed's student on each problem, in [0, 1]: `scores` is (seeds, problems)."""

    problems: tuple[str, ...]
    scores: np.ndarray
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        expected = (len(self.seeds), len(self.problems))
        if self.scores.shape != expected:
            raise ValueError(f"scores of {expected[0]} seeds on {expected[1]} problems cannot be {self.scores.shape}")


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean score of an arm minus the baseline's, with a 95 % interval and a two-sided p; all are fractions.

    `with_seeds`: the interval includes the scatter between seeds, not only between problems.
    """

    mean: float
    low: float
    high: float
    p: float
    num_problems: int
    with_seeds: bool


def compare(arm: ArmScores, baseline: ArmScores, *, over_seeds: bool = True, resamples: int = RESAMPLES) -> Difference:
    """Paired bootstrap of the difference in mean score.

    Seeds are paired if both arms have the same ones (a seed fixes the order of prompts), else independent. Raises
    ValueError if the arms have different problems. Every comparison with the same number of problems uses the same
    resamples, so repeated calls give the same numbers.
    """
    baseline = _reordered(baseline, arm.problems)
    weights = _weights(len(arm.problems), resamples)
    resampled = _resampled_means(arm.scores.mean(0) - baseline.scores.mean(0), weights)
    with_seeds = over_seeds and min(len(arm.seeds), len(baseline.seeds)) > 1
    if with_seeds:
        error, degrees_of_freedom = _seed_error(arm, baseline)
        resampled = resampled + error * np.random.default_rng(1).standard_t(degrees_of_freedom, size=resamples)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    mean = float(arm.scores.mean() - baseline.scores.mean())
    return Difference(mean, float(low), float(high), two_sided_p(resampled), len(arm.problems), with_seeds)


def two_sided_p(resampled: np.ndarray) -> float:
    """The level at which the percentile interval just touches 0; never 0 (Davison and Hinkley 1997)."""
    below, above = int((resampled <= 0).sum()), int((resampled >= 0).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(resampled)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family, in the given order (Holm 1979); nan stands for no test and stays nan.

    [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06]:  3 x 0.01, then max(0.03, 2 x 0.03), then max(0.06, 1 x 0.04)
    """
    adjusted = [math.nan] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _reordered(arm: ArmScores, problems: tuple[str, ...]) -> ArmScores:
    if arm.problems == problems:
        return arm
    unpaired = sorted(set(arm.problems) ^ set(problems))
    if unpaired:
        raise ValueError(
            f"a paired comparison needs the same problems: {len(unpaired)} are in one arm only, such as {unpaired[0]}"
        )
    columns = {problem: i for i, problem in enumerate(arm.problems)}
    return ArmScores(problems, arm.scores[:, [columns[problem] for problem in problems]], arm.seeds)


def _seed_error(arm: ArmScores, baseline: ArmScores) -> tuple[float, float]:
    """Standard error of the difference over seeds, and its degrees of freedom (Welch's for unpaired seeds)."""
    if sorted(arm.seeds) == sorted(baseline.seeds):
        baseline_means = dict(zip(baseline.seeds, baseline.scores.mean(1), strict=True))
        differences = [mean - baseline_means[seed] for seed, mean in zip(arm.seeds, arm.scores.mean(1), strict=True)]
        return float(np.std(differences, ddof=1) / math.sqrt(len(differences))), len(differences) - 1
    variances = [side.scores.mean(1).var(ddof=1) / len(side.seeds) for side in (arm, baseline)]
    total = sum(variances)
    if total == 0:
        return 0.0, 1.0
    freedom = total**2 / sum(v**2 / (len(side.seeds) - 1) for v, side in zip(variances, (arm, baseline), strict=True))
    return math.sqrt(total), float(freedom)


@lru_cache(maxsize=8)
def _weights(num_problems: int, resamples: int) -> np.ndarray:
    """(resamples, problems): how often each resample holds each problem; float32 is exact for these counts."""
    uniform = np.full(num_problems, 1 / num_problems)
    return np.random.default_rng(0).multinomial(num_problems, uniform, size=resamples).astype(np.float32)


def _resampled_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (weights @ values.astype(np.float32)).astype(np.float64) / len(values)
