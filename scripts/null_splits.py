"""p values where nothing differs: the seeds of one arm, split at random into two halves that are compared as two arms.

    python -m scripts.null_splits outputs/sweeps/demo_seeds --seeds 2

Reads the arms below the folders that have at least twice as many seeds, and prints the share of splits below each
threshold, for accuracy and for the log KL. docs/statistics.md has the numbers.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np

from tip_exp.report.arms import summarize
from tip_exp.report.run_files import read_records
from tip_exp.report.significance import ArmScores, compare
from tip_exp.report.tables import Table, markdown
from tip_exp.utils.errors import DataError, exit_on_error, quiet_when_reader_closes

THRESHOLDS = (0.05, 0.05 / 38)


def null_p_values(scores: ArmScores, seeds: int) -> list[float]:
    """p of every comparison of `seeds` seeds of an arm with `seeds` others."""
    p_values: list[float] = []
    for chosen in combinations(range(len(scores.seeds)), 2 * seeds):
        for first in combinations(chosen[1:], seeds - 1):  # the half with chosen[0], so that each split comes once
            half = [chosen[0], *first]
            halves = half, [i for i in chosen if i not in half]
            arm, baseline = (ArmScores(scores.problems, scores.scores[i], tuple(range(seeds))) for i in halves)
            if (difference := compare(arm, baseline)) is not None:
                p_values.append(difference.p)
    return p_values


@quiet_when_reader_closes
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="+", type=Path, metavar="FOLDER", help="runs, or an archive of runs")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of each half (2)")
    options = parser.parse_args()
    with exit_on_error(DataError):
        print(markdown(split_table(options.roots, options.seeds)))


def split_table(roots: list[Path], seeds: int) -> Table:
    """A row per arm and metric, then the medians. Raises DataError if no arm has twice as many seeds."""
    rows: list[list[str]] = []
    shares: dict[str, list[list[float]]] = {"accuracy": [], "log KL": []}
    for arm in summarize(read_records(roots)[0]):
        for name, scores in (("accuracy", arm.scores), ("log KL", arm.kl_scores)):
            if scores is None or len(scores.seeds) < 2 * seeds:
                continue
            p_values = np.array(null_p_values(scores, seeds))
            shares[name].append([float((p_values < threshold).mean()) for threshold in THRESHOLDS])
            cells = [f"{100 * share:.1f}" for share in shares[name][-1]]
            rows.append([arm.pair, f"{arm.selector} {100 * arm.retention:g} %", name, str(len(p_values)), *cells])
    if not rows:
        raise DataError(f"no arm has the {2 * seeds} seeds that two halves of {seeds} need")
    for name, of_arms in shares.items():
        if of_arms:
            rows.append(
                ["median", f"{len(of_arms)} arms", name, "", *(f"{100 * m:.1f}" for m in np.median(of_arms, 0))]
            )
    headings = ["pair", "arm", "metric", "splits", *(f"% with p < {threshold:.4f}" for threshold in THRESHOLDS)]
    return Table("Splits of one arm's seeds", headings, rows)


if __name__ == "__main__":
    main()
