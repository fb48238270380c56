"""`tip-report`: run folders -> tables in the terminal, as Markdown, CSV and LaTeX, and one HTML page; from files alone.

tip-report outputs/sweeps/demo --markdown results/demo.md --csv results/demo.csv
tip-report outputs --table table5 --latex table5.tex     (rows and columns of the paper, our number over the paper's)
tip-report outputs --html report.html                    (plots and the token viewer, in one file)
tip-report results outputs --out results                 (every table that can be filled, and what cannot: README.md)
tip-report wandb | sync …                                (a W&B workspace; upload of offline runs: see dashboards.py)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tip_exp.records.reader import gather
from tip_exp.report.arms import runs_frame, summarize
from tip_exp.report.overview import SAMPLES, csv_frame, overview
from tip_exp.report.tables import latex, markdown, write

COMMANDS = "Other commands, each with its own --help: tip-report results, tip-report wandb, tip-report sync."


def _tables(arguments: list[str]) -> None:
    from tip_exp.report.paper import LAYOUTS, paper_tables

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
        from tip_exp.report.page import page

        write(given.html, page(records, summary))
    if given.png:
        from tip_exp.report.pictures import write_pictures

        try:
            write_pictures(records, summary, given.png)
        except (FileNotFoundError, RuntimeError, subprocess.TimeoutExpired) as error:
            sys.exit(f"error: --png: {error}")


def _results(arguments: list[str]) -> None:
    from tip_exp.report.results_page import write_results

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
        from tip_exp.report import wandb as dashboards

        dashboards.main(arguments)
    elif arguments[:1] == ["results"]:
        _results(arguments[1:])
    else:
        _tables(arguments)


if __name__ == "__main__":
    main()
