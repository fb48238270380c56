"""How often the report's intervals hold the true difference, in simulated experiments whose truth is known.

The log-odds of a right response are those of the problem, plus normal effects of arm, seed, arm x problem and
seed x problem; a student's score on a problem is the mean of 4 responses. Each experiment draws 256 new problems and
new seeds for both arms. Two intervals at 95 % are compared: over problems alone, and the one of
tip_exp.report.significance.

python -m benchmarks coverage --out results/coverage.md
"""

from __future__ import annotations

import argparse
import math
from functools import cache
from pathlib import Path

import numpy as np

from tip_exp.report.significance import ArmScores, Estimate, compare
from tip_exp.report.tables import Table, markdown, write

PROBLEMS, SAMPLES = 256, 4
EASINESS = (1.9, 1.5)  # log-odds of the problems, mean and standard deviation: accuracy near 0.8
INTERACTION = 0.4  # standard deviation of arm x problem and of seed x problem, log-odds
SEEDS = (1, 2, 3, 5, 10)
SEED_SDS = (0.0, 1.0, 3.0)  # of one student's accuracy over training seeds, points
EFFECTS = (0.0, 3.0)  # true difference, points
MARGIN = 0.02  # of the statement of equivalence
METHODS = ("problems", "report")


def simulate(effect: float, seed_sd: float, seeds: int, experiments: int, *, paired: bool = True) -> dict[str, float]:
    """Coverage (fraction) and median width (points) by method: {"report": 0.95, "report_width": 8.6, …}.

    Also "p_below", the fraction of p < 0.05, and "within", that of equivalence within MARGIN; nan with one seed.
    `effect` and `seed_sd` are points of accuracy. Unpaired: the two arms have different seeds.
    """
    rng = np.random.default_rng([int(10 * effect), int(10 * seed_sd), seeds, paired])
    shift, truth = _shift_of(effect)
    seed_scale = seed_sd / 100 / _slope()
    numbers = tuple(range(seeds)), tuple(range(seeds) if paired else range(seeds, 2 * seeds))
    names = tuple(map(str, range(PROBLEMS)))
    rows: list[dict[str, float]] = []
    for _ in range(experiments):
        easiness = rng.normal(*EASINESS, size=PROBLEMS)
        arm = ArmScores(names, _scores(rng, easiness + shift, seed_scale, seeds), numbers[0])
        baseline = ArmScores(names, _scores(rng, easiness, seed_scale, seeds), numbers[1])
        difference = compare(arm, baseline)
        assert difference, "the arms have the same problems"
        by_problem = arm.scores.mean(0) - baseline.scores.mean(0)
        alone = Estimate(difference.mean, by_problem.std(ddof=1) / math.sqrt(PROBLEMS))
        intervals = (alone.low, alone.high), (difference.low, difference.high)
        row: dict[str, float] = {"p_below": difference.p < 0.05, "within": difference.margin <= MARGIN}
        for method, (low, high) in zip(METHODS, intervals, strict=True):
            row |= {method: low <= truth <= high, f"{method}_width": 100 * (high - low)}
        rows.append(row)
    summary = {
        name: float((np.median if name.endswith("width") else np.mean)([row[name] for row in rows])) for name in rows[0]
    }
    return summary if seeds > 1 else summary | {"p_below": math.nan, "within": math.nan}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="50 experiments a row instead of 2,000")
    parser.add_argument("--out", type=Path, default=Path("results/coverage.md"), help="the table, as Markdown")


def main(options: argparse.Namespace) -> None:
    experiments = 50 if options.quick else 2000
    columns = ("problems", "problems_width", "report", "report_width", "p_below", "within")
    headings = ["true difference", "seed sd", "seeds", "problems only", "width", "report", "width"]
    headings += ["p < 0.05", f"within ± {100 * MARGIN:g}"]
    rows: list[list[str]] = []
    for effect in EFFECTS:
        for seed_sd in SEED_SDS:
            for seeds in SEEDS:
                shares = simulate(effect, seed_sd, seeds, experiments)
                cells = [shares[name] if name.endswith("width") else 100 * shares[name] for name in columns]
                texts = ["-" if math.isnan(cell) else f"{cell:.1f}" for cell in cells]
                rows.append([f"{effect:g}", f"{seed_sd:g}", str(seeds), *texts])
    error = 100 * math.sqrt(0.95 * 0.05 / experiments)
    text = (
        "# Coverage of the report's intervals\n\n"
        "Made by `python -m benchmarks coverage`; the model is described in "
        f"benchmarks/coverage.py. {experiments} simulated experiments a row, {PROBLEMS} problems, {SAMPLES} "
        "responses to each, the same seeds in both arms. Coverage and shares in %, with a simulation error of "
        f"{error:.1f} at 95 %; differences, median widths and the seed sd (of one student's accuracy over training "
        "seeds) in points.\n\n"
    )
    notes = [
        "- problems only: ignores the seeds. With one seed the report prints this interval, says so, and prints no p.",
        "- report: src/tip_exp/report/significance.py.",
        "- p < 0.05: false alarms where the true difference is 0, else power. within ± 2: equivalence is stated; "
        "falsely where the true difference is 3.",
        "- With two seeds that scatter by 3 points, the report's interval covers less than 95 %: two values say little "
        "about a scatter. Use five seeds.",
    ]
    write(options.out, text + markdown(Table("", headings, rows)) + "\n\n" + "\n".join(notes) + "\n")
    print(f"{options.out} written")


def _scores(rng: np.random.Generator, log_odds: np.ndarray, seed_scale: float, seeds: int) -> np.ndarray:
    """(seeds, problems): mean of SAMPLES responses."""
    of_problem = log_odds + rng.normal(0, INTERACTION, size=PROBLEMS)
    of_seed = rng.normal(0, seed_scale, size=(seeds, 1)) + rng.normal(0, INTERACTION, size=(seeds, PROBLEMS))
    return rng.binomial(SAMPLES, _probability(of_problem + of_seed)) / SAMPLES


def _probability(log_odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-log_odds))


@cache
def _population() -> np.ndarray:
    """Log-odds of half a million pairs of student and problem, without the effect of the seed."""
    rng = np.random.default_rng(0)
    return rng.normal(*EASINESS, size=500_000) + rng.normal(0, math.sqrt(2) * INTERACTION, size=500_000)


@cache
def _slope() -> float:
    """Change of the mean accuracy by log-odds."""
    p = _probability(_population())
    return float((p * (1 - p)).mean())


@cache
def _shift_of(effect: float) -> tuple[float, float]:
    """Log-odds that raise the mean accuracy by about `effect` points, and the rise that they give, as a fraction."""
    shift = effect / 100 / _slope()
    rise = _probability(_population() + shift) - _probability(_population())
    return shift, float(rise.mean())
