"""Is a difference between two selectors more than chance: paired bootstrap over problems, Holm's correction.

What is compared is two arms (all seeds of one selector at one retention) on the *same* problems. The responses to one
problem are not independent items, so they are averaged first and a problem is the unit that is drawn: k samples times
S seeds of one problem stay together (a cluster). That alone answers for these trained students. Whether another seed
would say the same is a second question: with two seeds or more in both arms, the scatter between seeds enters as well,
as a Student t with the degrees of freedom that so few seeds have. Noise of sampling is in both parts, so this errs on
the wide side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000  # a p of 0.05 is then known to 0.002
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Arm:
    """Accuracy of each seed's student on each problem, in [0, 1]: `scores` is (S, P), a column a problem."""

    problems: tuple[str, ...]
    scores: np.ndarray
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        expected = (len(self.seeds), len(self.problems))
        if self.scores.shape != expected:
            raise ValueError(f"scores of {expected[0]} seeds on {expected[1]} problems cannot be {self.scores.shape}")


@dataclass(frozen=True, slots=True)
class Difference:
    """`ours - baseline` in mean accuracy with a 95 % interval and a two-sided p; all of it fractions.

    `with_seeds`: the interval is for seeds that were not trained as well, not only for problems that were not asked.
    """

    mean: float
    low: float
    high: float
    p: float
    num_problems: int
    with_seeds: bool


def compare(ours: Arm, baseline: Arm, *, over_seeds: bool = True, resamples: int = RESAMPLES) -> Difference:
    """Paired bootstrap of the difference in mean accuracy.

    Seeds are paired when both arms have the same ones (a seed fixes the order of prompts), else independent. Raises
    ValueError if the arms were not asked the same problems. The draws are the same for every comparison of that many
    problems, so a table does not change from one call to the next.
    """
    baseline = _in_order_of(ours, baseline)
    weights = _weights(len(ours.problems), resamples)
    drawn = _drawn_means(ours.scores.mean(0) - baseline.scores.mean(0), weights)
    with_seeds = over_seeds and min(len(ours.seeds), len(baseline.seeds)) > 1
    if with_seeds:
        error, freedom = _seed_error(ours, baseline)
        drawn = drawn + error * np.random.default_rng(1).standard_t(freedom, size=resamples)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    mean = float(ours.scores.mean() - baseline.scores.mean())
    return Difference(mean, float(low), float(high), two_sided_p(drawn), len(ours.problems), with_seeds)


def two_sided_p(drawn: np.ndarray) -> float:
    """The level at which the percentile interval of these draws just touches 0; never 0 (Davison and Hinkley 1997)."""
    below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(drawn)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of a family, in the given order (Holm 1979); a nan is no test and stays nan.

    [0.01, 0.04, 0.03] -> [0.03, 0.06, 0.06]:  3 x 0.01, then max(0.03, 2 x 0.03), then max(0.06, 1 x 0.04)
    """
    adjusted = [math.nan] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def standard_error(arm: Arm) -> float:
    """Of an arm's mean: over seeds if there are several, else over problems; nan for one problem."""
    values = arm.scores.mean(1) if len(arm.seeds) > 1 else arm.scores.mean(0)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def _in_order_of(ours: Arm, baseline: Arm) -> Arm:
    if ours.problems == baseline.problems:
        return baseline
    only = sorted(set(ours.problems) ^ set(baseline.problems))
    if only:
        raise ValueError(
            f"a paired comparison needs the same problems: {len(only)} were asked of one arm alone, such as {only[0]}"
        )
    place = {problem: i for i, problem in enumerate(baseline.problems)}
    columns = [place[problem] for problem in ours.problems]
    return Arm(ours.problems, baseline.scores[:, columns], baseline.seeds)


def _seed_error(ours: Arm, baseline: Arm) -> tuple[float, float]:
    """Standard error of the difference over seeds, and its degrees of freedom (Welch's for unpaired seeds)."""
    if sorted(ours.seeds) == sorted(baseline.seeds):
        at = dict(zip(baseline.seeds, baseline.scores.mean(1), strict=True))
        differences = [row - at[seed] for seed, row in zip(ours.seeds, ours.scores.mean(1), strict=True)]
        return float(np.std(differences, ddof=1) / math.sqrt(len(differences))), len(differences) - 1
    squares = [arm.scores.mean(1).var(ddof=1) / len(arm.seeds) for arm in (ours, baseline)]
    total = sum(squares)
    if total == 0:
        return 0.0, 1.0
    freedom = total**2 / sum(s**2 / (len(arm.seeds) - 1) for s, arm in zip(squares, (ours, baseline), strict=True))
    return math.sqrt(total), float(freedom)


@lru_cache(maxsize=8)
def _weights(num_problems: int, resamples: int) -> np.ndarray:
    """(R, P): how often each draw holds each problem; float32 is exact for counts and halves the memory."""
    even = np.full(num_problems, 1 / num_problems)
    return np.random.default_rng(0).multinomial(num_problems, even, size=resamples).astype(np.float32)


def _drawn_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (weights @ values.astype(np.float32)).astype(np.float64) / len(values)
