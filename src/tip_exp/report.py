"""`tip-report`: run folders -> tables in the terminal, as Markdown, CSV and LaTeX, and one HTML page; from files alone.

tip-report outputs/sweeps/demo --markdown results/demo.md --csv results/demo.csv
tip-report outputs --table table5 --latex table5.tex     (rows and columns of the paper, our number over the paper's)
tip-report outputs --html report.html                    (plots and the token viewer, in one file)
tip-report results outputs --out results                 (every table that can be filled, and what cannot: README.md)
tip-report wandb | sync …                                (a W&B workspace; upload of offline runs: see dashboards.py)
"""

# pyright: reportGeneralTypeIssues=false
# (pandas types a column of a frame as a Series, a frame or anything)
from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd

from tip_exp.runs import RunRecord, read_runs
from tip_exp.statistics import Difference
from tip_exp.summary import ACCURACIES, runs_frame, summarize
from tip_exp.tables import Table, latex, markdown

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

COMMANDS = "Other commands, each with its own --help: tip-report results, tip-report wandb, tip-report sync."


def overview(summary: pd.DataFrame) -> Table:
    """The summary as text: one row an arm and benchmark; columns that would say one thing everywhere are left out."""
    columns = dict(COLUMNS)
    if summary["benchmark"].nunique() > 1:
        columns = {"benchmark": "benchmark"} | columns
    if summary["pair"].nunique() > 1:
        columns = {"pair": "pair"} | columns
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


def gather(roots: list[Path]) -> list[RunRecord]:
    """The records below the roots, or an exit that says what is wrong."""
    if missing := [root for root in roots if not root.is_dir()]:
        sys.exit(f"error: {missing[0]} is not a folder; give folders that hold runs, such as outputs/sweeps/demo")
    records = read_runs(roots)
    if not records:
        sys.exit(f"error: no run (a folder with config.yaml) below {', '.join(map(str, roots))}")
    return records


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _text(name: str, value: object) -> str:
    if name in ACCURACIES:
        return value.percent()  # pyright: ignore[reportAttributeAccessIssue]
    if name == "difference":
        return difference_text(value)  # pyright: ignore[reportArgumentType]
    if name == "retention":
        return f"{100 * value:g} %"  # pyright: ignore[reportOperatorIssue]
    if name in FORMS:
        return "-" if math.isnan(value) else FORMS[name].format(value)  # pyright: ignore[reportArgumentType]
    return str(value)


def _tables(arguments: list[str]) -> None:
    from tip_exp.paper import LAYOUTS, paper_tables

    parser = argparse.ArgumentParser(prog="tip-report", description="Tables from run folders.", epilog=COMMANDS)
    parser.add_argument("roots", nargs="*", type=Path, default=[Path("outputs")], help="folders that hold runs")
    parser.add_argument("--table", choices=list(LAYOUTS), help="a table of the paper instead of the overview")
    parser.add_argument("--markdown", type=Path, help="also write the table as Markdown")
    parser.add_argument("--csv", type=Path, help="also write the numbers as CSV")
    parser.add_argument("--latex", type=Path, help="also write the table as LaTeX (booktabs)")
    parser.add_argument("--html", type=Path, help="also write one page with plots and the token viewer")
    parser.add_argument("--png", type=Path, help="also draw the page's figures into this folder (needs a Chromium)")
    given = parser.parse_args(arguments)
    records = gather(given.roots)
    summary = summarize(runs_frame(records))
    tables = paper_tables(given.table, summary) if given.table else [overview(summary)]
    if not tables:
        sys.exit(f"error: no finished run below {', '.join(map(str, given.roots))} belongs to {given.table}")
    text = "\n\n".join(markdown(table) for table in tables) + f"\n\n{SAMPLES}\n"
    print(text, end="")
    if given.markdown:
        write(given.markdown, text)
    if given.latex:
        write(given.latex, "\n\n".join(latex(table) for table in tables) + "\n")
    if given.csv:
        write(given.csv, csv_frame(summary).to_csv(index=False))
    if given.html:
        from tip_exp.page import page

        write(given.html, page(records, summary))
    if given.png:
        from tip_exp.pictures import write_pictures

        try:
            write_pictures(records, summary, given.png)
        except (FileNotFoundError, RuntimeError, subprocess.TimeoutExpired) as error:
            sys.exit(f"error: --png: {error}")


def _results(arguments: list[str]) -> None:
    from tip_exp.results_page import write_results

    parser = argparse.ArgumentParser(prog="tip-report results", description="Every table that run folders can fill.")
    parser.add_argument("roots", nargs="*", type=Path, default=[Path("outputs")], help="folders that hold runs")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where README.md and the tables go")
    given = parser.parse_args(arguments)
    roots = " ".join(str(root) for root in given.roots)
    write_results(gather(given.roots), given.out, f"tip-report results {roots} --out {given.out}")
    print(f"{given.out / 'README.md'} written")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] in (["wandb"], ["sync"]):
        from tip_exp import dashboards

        dashboards.main(arguments)
    elif arguments[:1] == ["results"]:
        _results(arguments[1:])
    else:
        _tables(arguments)


if __name__ == "__main__":
    main()
