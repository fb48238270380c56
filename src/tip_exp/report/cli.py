"""`tip-report`: run folders -> tables in the terminal, as Markdown, CSV and LaTeX, and an HTML page with plots.

tip-report outputs/sweeps/demo --markdown results/demo.md --csv results/demo.csv
tip-report outputs --where learner.lr=0.002 --sort final --descending --columns selector,retention,final,"vs full"
tip-report outputs --table table5 --latex table5.tex     (rows and columns of the paper, our number over the paper's)
tip-report outputs --table leaderboard                   (arms ranked by held-out KL, with groups of like arms)
tip-report outputs --html report.html                    (plots and the token viewer, in one file)
tip-report results outputs --out results                 (all tables, and which cells of the paper's tables are missing)
tip-report wandb | sync …                                (a W&B workspace; upload of offline runs: see report/wandb.py)
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path

from tip_exp.records.reader import RunRecord, runs_below
from tip_exp.report import wandb
from tip_exp.report.arms import ArmResult, summarize
from tip_exp.report.columns import LABELS, NAMES, select_arms, sort_arms
from tip_exp.report.leaderboard import LEADERBOARD, leaderboards
from tip_exp.report.overview import COMPACT, csv_text, legend, overviews
from tip_exp.report.paper import LAYOUTS, paper_tables
from tip_exp.report.results_page import write_results
from tip_exp.report.run_files import read_records
from tip_exp.report.shadows import shadow_tables
from tip_exp.report.tables import Table, latex, markdown, write
from tip_exp.utils.errors import DataError, exit_on_error, quiet_when_reader_closes
from tip_exp.utils.paths import not_writable

EPILOG = "Other commands, each with its own --help: tip-report results, tip-report wandb, tip-report sync."


def _parser(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser with the argument that all commands share."""
    parser = argparse.ArgumentParser(prog=command, allow_abbrev=False, description=description, epilog=epilog)
    parser.add_argument(
        "roots",
        nargs="*",
        type=Path,
        default=[Path("outputs")],
        help="folders that hold runs, or archives of them (NAME.runs.gz)",
    )
    return parser


def _tables(arguments: list[str]) -> None:
    parser = _parser("tip-report", "Tables from run folders.", EPILOG)
    parser.add_argument("--table", choices=[*LAYOUTS, LEADERBOARD], help="a table of the paper, or arms ranked by KL")
    parser.add_argument("--columns", help=f"all, or some of: {', '.join(NAMES)}")
    parser.add_argument(
        "--where", action="append", default=[], metavar="KEY=VALUE",
        help=f"only rows with this config value, such as learner.lr=0.001, or one of: {', '.join(LABELS)}",
    )  # fmt: skip
    parser.add_argument("--sort", metavar="COLUMN", help="smallest value first")
    parser.add_argument("--descending", action="store_true", help="with --sort: largest value first")
    parser.add_argument("--markdown", type=Path, help="also write the table as Markdown")
    parser.add_argument("--csv", type=Path, help="also write the numbers as CSV")
    parser.add_argument("--latex", type=Path, help="also write the table as LaTeX (booktabs)")
    parser.add_argument("--html", type=Path, help="also write one page with plots and the token viewer")
    parser.add_argument("--png", type=Path, help="also draw the page's figures into this folder (needs a Chromium)")
    given = parser.parse_args(arguments)
    if given.descending and not given.sort:
        raise DataError("--descending needs --sort COLUMN")
    if given.table and (given.sort or given.columns):
        raise DataError("--table has its own rows and columns; leave out --sort and --columns")
    if given.table in LAYOUTS and any(text.startswith(("selector", "retention")) for text in given.where):
        raise DataError(
            f"--table {given.table} has rows of its own selectors; leave out --where {' '.join(given.where)}"
        )
    for option in ("markdown", "csv", "latex", "html", "png"):
        _check_output(f"--{option}", getattr(given, option), is_folder=option == "png")
    records, damaged = read_records(given.roots)
    arms = summarize(records)
    arms = select_arms(arms, given.where)
    if given.sort:
        arms = sort_arms(arms, given.sort, descending=given.descending)
    columns = _columns(given.columns)
    if given.table == LEADERBOARD:
        tables = leaderboards(arms)
    else:
        tables = paper_tables(given.table, arms, arms) if given.table else overviews(arms, columns)
        tables += [] if given.table else shadow_tables(arms, records)
    if not tables:
        chosen = "".join(f" with {condition}" for condition in given.where)
        chosen += f" belongs to {given.table}" if given.table else ""
        needs = "; a leaderboard needs two arms with two finished seeds each" if given.table == LEADERBOARD else ""
        raise DataError(f"no run below {', '.join(map(str, given.roots))}{chosen}{needs}")
    text = "\n\n".join([*map(markdown, [*tables, *filter(None, [damaged])]), legend(tables)]) + "\n"
    text = text.encode(errors="backslashreplace").decode()  # lone surrogates, which no terminal prints
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # ± where the locale is ASCII
    print(text, end="")
    files: dict[Path | None, Callable[[], str]] = {
        given.markdown: lambda: text,
        given.latex: lambda: "\n\n".join(map(latex, tables)) + "\n",
        given.csv: lambda: csv_text(arms),
        given.html: lambda: _page(records, arms, damaged),
    }
    for path, content in files.items():
        if path is not None:
            write(path, content())
            print(f"{path} written", file=sys.stderr)
    if given.png:
        from tip_exp.report.pictures import write_pictures

        pictures = write_pictures(records, arms, given.png)
        print(f"{len(pictures)} pictures written to {given.png}", file=sys.stderr)


def _columns(given: str | None) -> Sequence[str]:
    if given is None:
        return COMPACT
    return tuple(NAMES) if given == "all" else [name.strip() for name in given.split(",")]


def _check_output(option: str, path: Path | None, *, is_folder: bool) -> None:
    """Raise DataError for a file, or a folder, that cannot be written: before the runs are read, which takes longer."""
    if path is None:
        return
    if path.exists() and path.is_dir() != is_folder:
        raise DataError(f"{option} {path}: this is a {'file; name a folder' if is_folder else 'folder; name a file'}")
    if problem := not_writable(path):
        raise DataError(f"{option}: {problem}")


def _page(records: list[RunRecord], arms: list[ArmResult], damaged: Table | None) -> str:
    from tip_exp.report.page import page  # plotly takes a second

    return page(records, arms, damaged)


def _results(arguments: list[str]) -> None:
    parser = _parser("tip-report results", "All tables that run folders can fill.")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where README.md and the tables go")
    given = parser.parse_args(arguments)
    _check_output("--out", given.out, is_folder=True)
    roots = " ".join(map(str, given.roots))
    records, damaged = read_records(given.roots)
    if damaged:
        print(markdown(damaged))
    write_results(records, given.out, f"tip-report results {roots} --out {given.out}", damaged)
    print(f"{given.out / 'README.md'} written")


def _wandb(arguments: list[str]) -> None:
    parser = _parser("tip-report wandb", "Save a W&B workspace that compares selectors.")
    parser.add_argument("--entity", required=True, help="the W&B user or team")
    parser.add_argument("--project", help="default: logger.project of the runs")
    parser.add_argument("--print", action="store_true", help="print the workspace instead of saving it")
    given = parser.parse_args(arguments)
    records, damaged = read_records(given.roots)
    if damaged:
        print(markdown(damaged), file=sys.stderr)
    made = wandb.workspace(records, given.entity, given.project or records[0].config["logger"]["project"])
    if given.print:
        print(made._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2))
    else:
        print(wandb.save(made))


def _sync(arguments: list[str]) -> None:
    parser = _parser("tip-report sync", "Upload offline W&B runs.")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that would upload, run none")
    given = parser.parse_args(arguments)
    runs_below(given.roots)
    pending = wandb.pending_uploads(given.roots)
    if given.dry_run:
        commands = [shlex.join(wandb.sync_command(folder)) for folder in pending]
        print(*commands, f"{len(pending)} offline runs to upload", sep="\n")
        return
    failed = wandb.upload(pending)
    print(f"{len(pending) - len(failed)} of {len(pending)} offline runs uploaded")
    if failed:
        folders = "".join(f"\n  {folder}" for folder in failed)
        raise ConnectionError(f"these were not uploaded:{folders}\nrun the same command to try them again")


COMMANDS = {"results": _results, "wandb": _wandb, "sync": _sync}


@quiet_when_reader_closes
def main() -> None:
    name, *arguments = sys.argv[1:] or [""]
    with exit_on_error(DataError, OSError):
        if name in COMMANDS:
            COMMANDS[name](arguments)
        else:
            _tables(sys.argv[1:])


if __name__ == "__main__":
    main()
