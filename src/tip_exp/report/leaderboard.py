"""Arms ranked by their held-out divergence, in groups without significant differences."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from tip_exp.report.arms import ArmResult, distinctions, group_by, setting_names
from tip_exp.report.columns import COLUMNS, NAMES
from tip_exp.report.overview import warnings
from tip_exp.report.significance import LEVEL, ArmScores, compare, holm
from tip_exp.report.tables import Table

LEADERBOARD = "leaderboard"  # the table's name; a sweep of this name has it in results/
SHOWN = ("selector", "retention", "kept", "seeds", "KL/response", "KL vs full", "final", "vs full")
NOTE = (
    "Ranked by {metric}. No two arms of a group differ significantly in it (pairwise t tests at 5 %, Holm over {tests} "
    "pairs). Arms of different groups need not differ: only the first arm of a group is known to differ from an arm of "
    "the group above."
)
ENOUGH_SEEDS = 5
FEW_SEEDS = (
    f"With fewer than {ENOUGH_SEEDS} seeds the smallest p values are too small (docs/statistics.md): groups then show "
    "where more seeds are needed."
)


def leaderboards(arms: list[ArmResult]) -> list[Table]:
    """A table for each setting and benchmark with two trained arms of two seeds or more; fewer have no groups."""
    tables: list[Table] = []
    settings = list(group_by([arm for arm in arms if arm.is_trained], "setting").values())
    for setting, name in zip(settings, setting_names(settings), strict=True):
        for benchmark, of_benchmark in group_by(setting, "benchmark").items():
            ranked = [arm for arm in of_benchmark if arm.seeds > 1 and arm.scores is not None]
            if len(ranked) > 1:
                tables.append(_leaderboard(ranked, f"Leaderboard: {name}, {benchmark}"))
    return tables


def _leaderboard(arms: list[ArmResult], title: str) -> Table:
    by_kl = any(arm.kl_scores is not None for arm in arms)
    unranked = [arm.name for arm in arms if by_kl and arm.kl_scores is None]
    arms = [arm for arm in arms if not by_kl or arm.kl_scores is not None]
    scores = {id(arm): arm.kl_scores if by_kl else arm.scores for arm in arms}
    arms = sorted(arms, key=lambda arm: _mean(scores[id(arm)]) * (1 if by_kl else -1))
    groups = indistinguishable([scores[id(arm)] for arm in arms])
    shown, differs = SHOWN, distinctions(arms)
    rows = [
        [str(rank), _letters(group), *(COLUMNS[NAMES[name]](arm) for name in shown)]
        for rank, (arm, group) in enumerate(zip(arms, groups, strict=True), start=1)
    ]
    if any(differs):
        shown, rows = (*shown, "differs in"), [[*row, text] for row, text in zip(rows, differs, strict=True)]
    metric = "the mean log KL of a response" if by_kl else "mean accuracy"
    note = NOTE.format(metric=metric, tests=math.comb(len(arms), 2))
    notes = [note, *([FEW_SEEDS] if min(arm.seeds for arm in arms) < ENOUGH_SEEDS else []), *warnings(arms)]
    notes += [f"Not ranked, since a run has no KL of the same problems: {', '.join(unranked)}."] if unranked else []
    return Table(title, ["rank", "group", *(NAMES[name] for name in shown)], rows, notes=notes)


def indistinguishable(scores: list[ArmScores | None]) -> list[int]:
    """The group of each arm, counted from 0, for arms in ranked order.

    An arm joins the group of the arm above it unless it differs from one of its members; then it opens the next. A pair
    without a p value (other problems, no scores) counts as not significant.
    """
    pairs = list(combinations(range(len(scores)), 2))
    differences = [compare(scores[j], scores[i]) for i, j in pairs]
    adjusted = holm([difference.p if difference else math.nan for difference in differences])
    apart = {pair for pair, p in zip(pairs, adjusted, strict=True) if p < 1 - LEVEL}
    groups: list[int] = []
    start = 0  # the first arm of the present group
    for j in range(len(scores)):
        if any((i, j) in apart for i in range(start, j)):
            start = j
        groups.append(groups[-1] + (start == j) if groups else 0)
    return groups


def _mean(scores: ArmScores | None) -> float:
    return float(np.mean(scores.scores)) if scores is not None else math.nan


def _letters(group: int) -> str:
    """0 -> "a", 25 -> "z", 26 -> "aa" """
    first, last = divmod(group, 26)
    return (_letters(first - 1) if first else "") + chr(ord("a") + last)
