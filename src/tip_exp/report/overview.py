"""Arm results as a table of text, one row per arm and benchmark, and as CSV."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tip_exp.report.arms import ArmResult
from tip_exp.report.tables import Table

NOTES = (
    "final, step 0, teacher: mean@k in % ± standard error (over seeds if there are several, else over problems)\n"
    "vs full: difference to training on every token [95 % interval], points; paired bootstrap over problems, and over "
    "seeds if both arms have two or more (*: one seed, so it holds for these students only)"
)
ACCURACIES = ("teacher", "start", "final", "greedy")
CSV_COLUMNS = (
    "pair", "data", "benchmark", "selector", "retention", "seeds", "runs", "sweeps", "hardware", *ACCURACIES,
    "kept_tokens", "loss_mib", "peak_gib", "process_gib", "wall_s", "no_tool_baseline", "state", "p_holm", "differs",
)  # fmt: skip


def _number(form: str, value: float) -> str:
    return "-" if math.isnan(value) else form.format(value)


# heading -> text of an arm's cell
COLUMNS: dict[str, Callable[[ArmResult], str]] = {
    "pair": lambda arm: arm.pair,
    "benchmark": lambda arm: arm.benchmark,
    "selector": lambda arm: arm.selector,
    "retention": lambda arm: f"{100 * arm.retention:g} %",
    "seeds": lambda arm: str(arm.seeds),
    "no-tool baseline": lambda arm: _number("{:.1f}", 100 * arm.no_tool_baseline),
    "teacher": lambda arm: arm.teacher.percent(),
    "step 0": lambda arm: arm.start.percent(),
    "final": lambda arm: arm.final.percent(),
    "greedy": lambda arm: arm.greedy.percent(),
    "vs full": lambda arm: str(arm.difference or "-"),
    "p (Holm)": lambda arm: _number("{:.3f}", arm.p_holm),
    "kept tokens": lambda arm: _number("{:,.0f}", arm.kept_tokens),
    "loss MiB": lambda arm: _number("{:.1f}", arm.loss_mib),
    "process GiB": lambda arm: _number("{:.2f}", arm.process_gib),
    "wall s": lambda arm: _number("{:.0f}", arm.wall_s),
    "state": lambda arm: arm.state,
    "differs in": lambda arm: arm.differs,
}


def overview(arms: list[ArmResult]) -> Table:
    """One row per arm and benchmark; columns that say nothing are left out."""
    is_shown = {
        "pair": len({arm.pair for arm in arms}) > 1,
        "benchmark": len({arm.benchmark for arm in arms}) > 1,
        "no-tool baseline": any(not math.isnan(arm.no_tool_baseline) for arm in arms),
        "differs in": any(arm.differs for arm in arms),
    }
    headings = [heading for heading in COLUMNS if is_shown.get(heading, True)]
    return Table("", headings, [[COLUMNS[heading](arm) for heading in headings] for arm in arms])


def csv_text(arms: list[ArmResult]) -> str:
    """All numbers of the arms; accuracies and differences with their intervals are fractions, nan is empty."""
    import pandas as pd  # takes a second

    return pd.DataFrame([_csv_row(arm) for arm in arms]).to_csv(index=False)


def _csv_row(arm: ArmResult) -> dict[str, Any]:
    row = {name: getattr(arm, name) for name in CSV_COLUMNS}
    row |= {name: "; ".join(row[name]) for name in ("sweeps", "hardware")}
    row |= {name: getattr(arm, name).mean for name in ACCURACIES}
    row |= {f"{name}_se": getattr(arm, name).se for name in ACCURACIES}
    row["difference"] = arm.difference.mean if arm.difference else math.nan
    for name in ("low", "high", "p", "with_seeds"):
        row[f"difference_{name}"] = getattr(arm.difference, name) if arm.difference else math.nan
    return row
