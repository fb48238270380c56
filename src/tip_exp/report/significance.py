"""Means over seeds and problems with the error of both, and the difference between two selectors.

A score is measured for each seed's student on each problem (mean over its responses, which are not independent). Its
mean over a (seeds, problems) table has a variance from both factors (Cameron, Gelbach and Miller 2011, with the
residual mean square of the two-way layout as their third term, which is unbiased for two seeds as well):

    V = V_problems + V_seeds - V_residual, at least max(V_problems, V_seeds)

Sampling noise is in both of the first terms, so it is subtracted once. Intervals and p are Student's t with the degrees
of freedom of Satterthwaite (1946). Seeds are paired if both arms have the same ones (a seed fixes the order of the
prompts). With one seed on a side nothing says how much seeds scatter: the interval covers other problems only, and
there is no p. `python -m benchmarks coverage` simulates both cases; results/coverage.md has its table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit  # cumulative distribution of Student's t, and its inverse

from tip_exp.records.reader import RunRecord

LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class ArmScores:
    """Mean score of each seed's student on each problem: `scores` is (seeds, problems)."""

    problems: tuple[str, ...]
    scores: np.ndarray
    seeds: tuple[int, ...]


def scores_of(done: list[RunRecord], benchmark: str, key: str) -> ArmScores | None:
    """Values by seed and problem of this key of the outcomes, "right" and "start" as means over the samples.

    None without a finished run, if a run has no such values, or if the runs were given different problems.
    """
    outcomes = [record.outcomes.get(benchmark, {}) for record in done]
    if not outcomes or any(not outcome.get(key) or not outcome["samples"] for outcome in outcomes):
        return None
    problems = tuple(outcomes[0][key])
    if any(outcome[key].keys() != outcomes[0][key].keys() for outcome in outcomes):
        return None
    samples = [outcome["samples"] if key in ("right", "start") else 1 for outcome in outcomes]
    values = [[outcome[key][name] / k for name in problems] for outcome, k in zip(outcomes, samples, strict=True)]
    return ArmScores(problems, np.array(values, dtype=float), tuple(record.config["seed"] for record in done))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error and degrees of freedom; nan where not measured.

    `over_seeds`: the error covers other training seeds and other problems; else other problems only.
    """

    mean: float
    se: float
    df: float = math.inf
    over_seeds: bool = False

    def half_width(self, level: float = LEVEL) -> float:
        """Half the width of the two-sided interval."""
        return float(stdtrit(self.df, (1 + level) / 2)) * self.se

    @property
    def low(self) -> float:
        return self.mean - self.half_width()

    @property
    def high(self) -> float:
        return self.mean + self.half_width()

    @property
    def p(self) -> float:
        """Two-sided p of a mean of 0; nan if the error leaves out the seeds."""
        if not self.over_seeds:
            return math.nan
        if self.se == 0:
            return float(self.mean == 0)
        return 2 * float(stdtr(self.df, -abs(self.mean) / self.se))

    @property
    def margin(self) -> float:
        """The smallest m for which a mean within ± m holds at 95 %; nan if the error leaves out the seeds.

        Two one-sided tests (Schuirmann 1987), each at 5 %: the 90 % interval lies within ± m.
        """
        return abs(self.mean) + self.half_width(2 * LEVEL - 1) if self.over_seeds else math.nan


def estimate(scores: np.ndarray) -> Estimate:
    """The mean of a (seeds, problems) table. A table of one seed gives an error over problems."""
    return _combine(float(scores.mean()), scores, [scores] if len(scores) > 1 else [])


def compare(arm: ArmScores | None, baseline: ArmScores | None) -> Estimate | None:
    """The arm's mean minus the baseline's on the same problems; None without scores, or if the problems differ."""
    if arm is None or baseline is None:
        return None
    if set(arm.problems) != set(baseline.problems):
        return None
    column_of = {problem: i for i, problem in enumerate(baseline.problems)}
    of_baseline = baseline.scores[:, [column_of[problem] for problem in arm.problems]]
    if sorted(arm.seeds) == sorted(baseline.seeds):
        row_of = {seed: i for i, seed in enumerate(baseline.seeds)}
        return estimate(arm.scores - of_baseline[[row_of[seed] for seed in arm.seeds]])
    by_problem = arm.scores.mean(0) - of_baseline.mean(0)
    tables = [arm.scores, of_baseline] if min(len(arm.seeds), len(baseline.seeds)) > 1 else []
    return _combine(float(by_problem.mean()), by_problem[None], tables)


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


def _combine(mean: float, by_problem: np.ndarray, tables: list[np.ndarray]) -> Estimate:
    """V_problems of `by_problem` (seeds, problems), plus V_seeds - V_residual of each table whose seeds are its own."""
    problems = by_problem.shape[1]
    v_problems = by_problem.mean(0).var(ddof=1) / problems
    parts = [(v_problems, problems - 1)]  # (variance of the mean, its degrees of freedom)
    v_seeds = v_residual = 0.0
    for table in tables:
        seeds = len(table)
        of_seeds = table.mean(1)
        residual = table - table.mean(0) - of_seeds[:, None] + table.mean()
        df = (seeds - 1) * (problems - 1)
        parts += [(of_seeds.var(ddof=1) / seeds, seeds - 1), ((residual**2).sum() / df / (seeds * problems), df)]
        v_seeds, v_residual = v_seeds + parts[-2][0], v_residual + parts[-1][0]
    variance = max(v_problems + v_seeds - v_residual, v_problems, v_seeds)
    spread = sum(part**2 / df for part, df in parts)
    df = max(variance**2 / spread, min(df for _, df in parts)) if spread else math.inf
    return Estimate(mean, math.sqrt(variance), float(df), bool(tables))
