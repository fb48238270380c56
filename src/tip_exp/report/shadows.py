"""What rules scored beside a training (`selector.shadows`) would have kept, over the steps with diagnostics."""

from __future__ import annotations

import statistics
from typing import Any

from tip_exp.records import metrics
from tip_exp.records.reader import RunRecord
from tip_exp.records.validate import is_finite
from tip_exp.report.arms import ArmResult, group_by, setting_names
from tip_exp.report.run_files import read_metrics
from tip_exp.report.tables import Table
from tip_exp.utils.errors import first_line

# heading -> metric of the rule that trains; `metrics.of_shadow` names that of a shadow
COLUMNS = {
    "overlap": metrics.OVERLAP,
    "kept": metrics.KEPT_FRAC,
    "gradient mass": metrics.GRADIENT_MASS,
    "KL mass": metrics.KL_MASS,
} | {f"{name.upper()} kept": metrics.quadrant_kept_frac(name) for name in metrics.QUADRANTS}
NOTE = (
    "%, mean ± standard deviation over the steps with diagnostics of finished runs. Overlap: Jaccard index with the "
    "tokens that are trained on. Gradient mass, KL mass: share of the norms of the logits' gradients, and of the "
    "reverse KL, each summed over all response tokens, that the rule's tokens hold. Q1 to Q4: share of the quadrant's "
    "tokens."
)


def shadow_tables(arms: list[ArmResult], records: list[RunRecord]) -> list[Table]:
    """A table for each setting whose finished runs have logged shadows: the rule that trains, then each shadow.

    Damaged rows of a run are a note of its table.
    """
    finished = {record.folder: record for record in records if record.is_done}
    groups, tables = list(group_by(arms, "setting").values()), []
    for group, name in zip(groups, setting_names(groups), strict=True):
        rows: list[list[str]] = []
        notes: list[str] = []
        trained = [arm for arm, *_ in group_by(group, "identity").values()]
        for arm in trained:
            of_arm = [finished[folder] for folder in arm.folders if folder in finished]
            scored = [rule for record in of_arm for rule in record.config["selector"].get("shadows", [])]
            if shadows := list(dict.fromkeys(scored)):
                steps = _steps(of_arm, notes)
                rows += _rows(arm.name, shadows, steps) if steps else []
        if rows or notes:
            shown = [i for i in range(len(rows[0]) if rows else 0) if any(row[i] != "-" for row in rows)]
            headings = ["trained on", "rule", "runs", "steps", *COLUMNS]
            cells = [[row[i] for i in shown] for row in rows]
            tables.append(Table(f"Shadow selectors: {name}", [headings[i] for i in shown], cells, notes=[NOTE, *notes]))
    return tables


def _steps(records: list[RunRecord], notes: list[str]) -> list[list[dict[str, Any]]]:
    """The rows with shadows of each run that has any."""
    steps: list[list[dict[str, Any]]] = []
    for record in records:
        try:
            rows = read_metrics(record)
        except (OSError, ValueError) as error:
            notes.append(f"{record.folder} is left out: {first_line(error)}.")
            continue
        steps.append([row for row in rows if any(name.startswith(metrics.SHADOW) for name in row)])
    return [rows for rows in steps if rows]


def _rows(label: str, shadows: list[str], steps: list[list[dict[str, Any]]]) -> list[list[str]]:
    rows = [row for of_run in steps for row in of_run]
    lines = [("itself", list(COLUMNS.values()))]
    lines += [(rule, [metrics.of_shadow(rule, metric) for metric in COLUMNS.values()]) for rule in shadows]
    counts = [str(len(steps)), str(len(rows))]
    return [
        [label, rule, *counts, *(_cell([row.get(metric) for row in rows]) for metric in of_rule)]
        for rule, of_rule in lines
    ]


def _cell(values: list[Any]) -> str:
    """ "12.3 ± 0.4" of fractions, in %; "-" without a finite one."""
    percentages = [100 * value for value in values if is_finite(value)]
    if not percentages:
        return "-"
    spread = f" ± {statistics.stdev(percentages):.1f}" if len(percentages) > 1 else ""
    return f"{statistics.mean(percentages):.1f}{spread}"
