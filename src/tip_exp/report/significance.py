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


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean score of an arm minus the baseline's, with a 95 % interval and a two-sided p; all are fractions.

    `with_seeds`: the interval includes the scatter between seeds, not only between problems.
    """

    mean: float
    low: float
    high: float
    p: float
    with_seeds: bool

    def __str__(self) -> str:
        """ "+1.2 [-0.5, 2.9]", in points of accuracy; a star if an arm has one seed only."""
        star = "" if self.with_seeds else "*"
        return f"{100 * self.mean:+.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]{star}"


def compare(arm: ArmScores, baseline: ArmScores) -> Difference | None:
    """Paired bootstrap of the difference in mean score; None if the arms have different problems.

    Seeds are paired if both arms have the same ones (a seed fixes the order of prompts), else independent. Every
    comparison with the same number of problems uses the same resamples, so repeated calls give the same numbers.
    """
    if set(arm.problems) != set(baseline.problems):
        return None
    column_of = {problem: i for i, problem in enumerate(baseline.problems)}
    baseline_scores = np.take(baseline.scores, [column_of[problem] for problem in arm.problems], axis=1)
    by_problem = arm.scores.mean(0) - baseline_scores.mean(0)
    weights = _weights(len(by_problem))
    resampled = (weights @ by_problem.astype(np.float32)).astype(np.float64) / len(by_problem)
    with_seeds = min(len(arm.seeds), len(baseline.seeds)) > 1
    if with_seeds:
        error, degrees_of_freedom = _seed_error(arm, baseline)
        resampled = resampled + error * np.random.default_rng(1).standard_t(degrees_of_freedom, size=RESAMPLES)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    mean = float(arm.scores.mean() - baseline_scores.mean())
    return Difference(mean, float(low), float(high), two_sided_p(resampled), with_seeds)


def two_sided_p(resampled: np.ndarray) -> float:
    """The level at which the percentile interval just touches 0; never 0 (Davison and Hinkley 1997)."""
    below, above = int((resampled <= 0).sum()), int((resampled >= 0).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(resampled)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family, in the given order (Holm 1979); nan stands for no test and stays nan.

    [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06]:  3 x 0.01, then max(0.03, 2 x 0.03), then max(0.06, 1 x 0.04)
    """
    p = np.array(p_values)
    ascending = np.argsort(p)  # nan is last
    factors = np.count_nonzero(~np.isnan(p)) - np.arange(len(p))  # number of tests, one less, …
    adjusted = np.empty_like(p)
    adjusted[ascending] = np.minimum(1, np.maximum.accumulate(factors * p[ascending]))
    return adjusted.tolist()


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
def _weights(num_problems: int) -> np.ndarray:
    """(RESAMPLES, problems): how often each resample holds each problem; float32 is exact for these counts."""
    uniform = np.full(num_problems, 1 / num_problems)
    return np.random.default_rng(0).multinomial(num_problems, uniform, size=RESAMPLES).astype(np.float32)
