"""The summary of run folders as a table of text, one row an arm and benchmark, and as a frame of numbers."""

# pyright: reportGeneralTypeIssues=false
# (pandas types a column of a frame as a Series, a frame or anything)
from __future__ import annotations

import math

import pandas as pd

from tip_exp.report.arms import ACCURACIES
from tip_exp.report.significance import Difference
from tip_exp.report.tables import Table

COLUMNS = {  # column of the summary -> heading of the table
    "selector": "selector",
    "retention": "retention",
    "seeds": "seeds",
    "teacher": "teacher",
    "start": "step 0",
    "final": "final",
    "greedy": "greedy",
    "difference": "vs full",
    "p_holm": "p (Holm)",
    "kept_tokens": "kept tokens",
    "loss_mib": "loss MiB",
    "process_gib": "process GiB",
    "wall_s": "wall s",
    "state": "state",
}
FORMS = {
    "kept_tokens": "{:,.0f}",
    "loss_mib": "{:.1f}",
    "process_gib": "{:.2f}",
    "wall_s": "{:.0f}",
    "p_holm": "{:.3f}",
}
SAMPLES = (
    "final, step 0, teacher: mean@k in % ± standard error (over seeds if there are several, else over problems)\n"
    "vs full: difference to training on every token [95 % interval], points; paired bootstrap over problems, and over "
    "seeds where both have two or more (*: one seed, so it speaks for these students alone)"
)


def overview(summary: pd.DataFrame) -> Table:
    """The summary as text: one row an arm and benchmark; columns that would say one thing everywhere are left out."""
    columns = dict(COLUMNS)
    if summary["benchmark"].nunique() > 1:
        columns = {"benchmark": "benchmark"} | columns
    if summary["pair"].nunique() > 1:
        columns = {"pair": "pair"} | columns
    if summary["no_tool_baseline"].notna().any():  # beside the results of tool tasks, which have to be read against it
        at = list(columns).index("teacher")
        columns = dict(
            [*list(columns.items())[:at], ("no_tool_baseline", "no-tool baseline"), *list(columns.items())[at:]]
        )
    if summary["differs"].any():
        columns["differs"] = "differs in"
    texts = {name: [_text(name, value) for value in summary[name]] for name in columns}
    rows = [list(values) for values in zip(*(texts[name] for name in columns), strict=True)]
    return Table("", list(columns.values()), rows)


def csv_frame(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary as numbers: `final` and `final_se` are fractions, and so are `difference`, its `low` and `high`."""
    flat = summary.drop(columns=["same", "base", "config", "arm", "difference", "score", "seed_list", "folders"])
    for name in ("sweeps", "hardware"):
        flat[name] = ["; ".join(values) for values in summary[name]]
    for name in ACCURACIES:
        flat[name] = [measured.mean for measured in summary[name]]
        flat[f"{name}_se"] = [measured.se for measured in summary[name]]
    for name in ("mean", "low", "high", "p", "with_seeds"):
        heading = "difference" if name == "mean" else f"difference_{name}"
        flat[heading] = [getattr(one, name) if one else math.nan for one in summary["difference"]]
    return flat


def difference_text(difference: Difference | None) -> str:
    """ "+1.2 [-0.5, 2.9]", in points of accuracy; a star where only one seed of an arm was there."""
    if difference is None:
        return "-"
    mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]{'' if difference.with_seeds else '*'}"


def _text(name: str, value: object) -> str:
    if name in ACCURACIES:
        return value.percent()  # pyright: ignore[reportAttributeAccessIssue]
    if name == "difference":
        return difference_text(value)  # pyright: ignore[reportArgumentType]
    if name == "retention":
        return f"{100 * value:g} %"  # pyright: ignore[reportOperatorIssue]
    if name == "no_tool_baseline":
        return "-" if math.isnan(value) else f"{100 * value:.1f}"  # pyright: ignore[reportArgumentType, reportOperatorIssue]
    if name in FORMS:
        return "-" if math.isnan(value) else FORMS[name].format(value)  # pyright: ignore[reportArgumentType]
    return str(value)
