"""`tip-report`: run folders -> one table, in the terminal, as Markdown and as CSV. Tables come from files alone.

tip-report outputs/sweeps/demo --markdown results/demo.md --csv results/demo.csv
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (pandas types a column of a frame as a Series, a frame or anything)
from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tip_exp.paths import RunFolder

COLUMNS = {  # column of the frame -> heading of the table
    "selector": "selector",
    "retention": "retention",
    "seeds": "seeds",
    "teacher": "teacher",
    "start": "step 0",
    "final": "final",
    "greedy": "greedy",
    "kept_tokens": "kept tokens",
    "loss_mib": "loss MiB",
    "process_gib": "process GiB",
    "wall_s": "wall s",
    "state": "state",
}


@dataclass(frozen=True, slots=True)
class Measured:
    """A mean with its standard error, both fractions."""

    mean: float
    se: float

    def percent(self) -> str:
        return "-" if math.isnan(self.mean) else f"{100 * self.mean:.1f} ± {100 * self.se:.1f}"


def find_runs(roots: list[Path]) -> list[RunFolder]:
    """Every folder below the roots that holds a run's config.yaml, by name."""
    found = {path.parent for root in roots for path in root.glob("**/config.yaml") if path.parent.name != ".hydra"}
    return [RunFolder(path) for path in sorted(found)]


def read_run(folder: RunFolder) -> dict[str, Any]:
    """One row of the frame: what the run is (its config) and what came out (its result.json, if it has one)."""
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    benchmark = next(iter(config["eval"]["benchmarks"]))
    row: dict[str, Any] = {
        "folder": str(folder.root),
        "sweep": config["sweep"],
        "pair": config["pair"]["label"],
        "data": config["data"]["label"],
        "benchmark": benchmark,
        "selector": config["selector"]["label"],
        "retention": config["selector"]["retention"],
        "seed": config["seed"],
        "same": _identity(config),
        "state": "done" if folder.result.exists() else "unfinished",
    }
    if not folder.result.exists():
        return row
    result = json.loads(folder.result.read_text(encoding="utf-8"))
    k = config["eval"]["samples"]
    for name in ("teacher", "start", "final"):
        values = result[name]
        row[name] = values.get(f"{benchmark}/mean@{k}", math.nan)
        row[f"{name}_se"] = values.get(f"{benchmark}/mean@{k}_se", math.nan)
    row["greedy"] = result["final"].get(f"{benchmark}/greedy", math.nan)
    row["greedy_se"] = result["final"].get(f"{benchmark}/greedy_se", math.nan)
    row["kept_tokens"] = result["totals"]["kept_tokens"]
    row["loss_mib"] = result["memory"].get("memory/loss_extra_mib", math.nan)
    row["process_gib"] = result["memory"]["memory/process_peak_gib"]
    row["wall_s"] = result["totals"]["wall_s"]
    row["hardware"], row["git_revision"] = result["hardware"], result["git_revision"]
    return row


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs that differ in their seed alone become one row; with several seeds the error is that over seeds.

    With one seed it is the standard error over problems, which does not know how another seed would have gone.
    """
    rows = []
    for _, group in runs.groupby("same", sort=False):
        done = group[group["state"] == "done"]
        first = group.iloc[0]
        row = {"pair": first["pair"], "benchmark": first["benchmark"]}
        row |= {"selector": first["selector"], "retention": first["retention"], "seeds": len(done)}
        for name in ("teacher", "start", "final", "greedy"):
            row[name] = _over_seeds(done, name)
        for name in ("kept_tokens", "loss_mib", "process_gib", "wall_s"):
            row[name] = done[name].mean() if len(done) else math.nan
        unfinished = len(group) - len(done)
        row["state"] = "done" if not unfinished else f"{unfinished} of {len(group)} unfinished"
        rows.append(row)
    return pd.DataFrame(rows)


def table(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary as text, with headings."""
    shown = summary[list(COLUMNS)].copy()
    for name in ("teacher", "start", "final", "greedy"):
        shown[name] = [measured.percent() for measured in summary[name]]
    shown["retention"] = [f"{100 * ratio:g} %" for ratio in summary["retention"]]
    for name, form in {
        "kept_tokens": "{:,.0f}",
        "loss_mib": "{:.1f}",
        "process_gib": "{:.2f}",
        "wall_s": "{:.0f}",
    }.items():
        shown[name] = ["-" if math.isnan(value) else form.format(value) for value in summary[name]]
    return shown.rename(columns=COLUMNS)


def csv_frame(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary as numbers: `final` and `final_se` are fractions."""
    flat = summary.copy()
    for name in ("teacher", "start", "final", "greedy"):
        flat[name] = [measured.mean for measured in summary[name]]
        flat[f"{name}_se"] = [measured.se for measured in summary[name]]
    return flat


def _over_seeds(done: pd.DataFrame, name: str) -> Measured:
    if not len(done):
        return Measured(math.nan, math.nan)
    if len(done) == 1:
        return Measured(done[name].iloc[0], done[f"{name}_se"].iloc[0])
    return Measured(done[name].mean(), done[name].std(ddof=1) / math.sqrt(len(done)))


def _identity(config: dict[str, Any]) -> str:
    """What runs must share to be averaged: everything but name, seed and where they log."""
    return json.dumps({k: v for k, v in config.items() if k not in ("name", "seed", "sweep", "logger")}, sort_keys=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables from run folders.")
    parser.add_argument("roots", nargs="*", type=Path, default=[Path("outputs")], help="folders that hold runs")
    parser.add_argument("--markdown", type=Path, help="also write the table as Markdown")
    parser.add_argument("--csv", type=Path, help="also write the numbers as CSV")
    arguments = parser.parse_args()
    if missing := [root for root in arguments.roots if not root.is_dir()]:
        sys.exit(f"error: {missing[0]} is not a folder; give folders that hold runs, such as outputs/sweeps/demo")
    runs = [read_run(folder) for folder in find_runs(arguments.roots)]
    if not runs:
        sys.exit(f"error: no run (a folder with config.yaml) below {', '.join(map(str, arguments.roots))}")
    summary = summarize(pd.DataFrame(runs))
    markdown = table(summary).to_markdown(index=False, disable_numparse=True)
    samples = (
        "final, step 0, teacher: mean@k in % ± standard error (over seeds if there are several, else over problems)"
    )
    print(f"{markdown}\n\n{samples}")
    if arguments.markdown:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(f"{markdown}\n\n{samples}\n", encoding="utf-8")
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        csv_frame(summary).to_csv(arguments.csv, index=False)


if __name__ == "__main__":
    main()
