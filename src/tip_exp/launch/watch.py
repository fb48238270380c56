"""`tip-exp watch`: a table of runs and how far they are, from their folders alone; nothing is written."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from tip_exp.launch.lock import holder
from tip_exp.records import metrics
from tip_exp.records.folder import RunFolder, last_error
from tip_exp.records.reader import find_runs, read_run
from tip_exp.utils.errors import first_line
from tip_exp.utils.io import read_rows
from tip_exp.utils.units import format_duration

HEADINGS = ("run", "state", "step", "accuracy", "loss", "tokens/s", "left")
NUM_TIMED = 10  # newest steps whose mean duration forecasts the time left
CLEAR = "\x1b[H\x1b[J"  # cursor to the upper left corner, then erase what is below
EVERY_S = 5.0  # seconds between tables


def watch(arguments: list[str]) -> None:
    """Print the table of all runs below a folder, again and again where the output is a terminal."""
    parser = argparse.ArgumentParser(
        prog="tip-exp watch",
        allow_abbrev=False,
        description="A table of the runs below a folder: state, step, newest accuracy, loss, speed, time left (of "
        "training alone). On a terminal it is renewed until all runs are done or Ctrl-C.",
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("outputs"), help="a sweep's folder (default: outputs)"
    )
    parser.add_argument("--once", action="store_true", help="print the table once")
    parser.add_argument("--every", type=float, default=EVERY_S, metavar="S", help="seconds between tables (default: 5)")
    given = parser.parse_args(arguments)
    if not given.folder.is_dir():
        parser.error(f"{given.folder} is not a folder")
    try:
        while True:
            lines, all_done = table(given.folder)
            if given.once or not sys.stdout.isatty():
                return print("\n".join(lines))
            print(CLEAR + "\n".join(fit_terminal(lines)), flush=True)
            if all_done:
                return None
            time.sleep(max(0.2, given.every))
    except KeyboardInterrupt:
        return None


def table(folder: Path) -> tuple[list[str], bool]:
    """The lines to print, and whether every run is done."""
    cells = [cells_of(run, folder) for run in find_runs([folder])]
    states = [row[1] for row in cells]
    total = f"{states.count('done')} of {len(cells)} done, {states.count('running')} running in {folder}"
    return [total, *align(cells)], bool(cells) and set(states) == {"done"}


def align(cells: list[tuple[str, ...]]) -> list[str]:
    """Lines of equal columns below HEADINGS."""
    rows = [HEADINGS, *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def fit_terminal(lines: list[str]) -> list[str]:
    """The lines, cut to the terminal's width; of more than it holds the first ones, and how many there are."""
    size = shutil.get_terminal_size()
    shown = lines if len(lines) < size.lines else [*lines[: size.lines - 2], f"… {len(lines)} lines in all"]
    return [line[: size.columns] for line in shown]


def cells_of(run: RunFolder, folder: Path) -> tuple[str, ...]:
    """A row of the table. A run whose files are torn, or not there yet, says so in its last cell."""
    name = str(run.root.relative_to(folder)) if run.root != folder else run.root.name
    try:
        config, rows = read_run(run, "newer").config, read_rows(run.metrics)
        num_steps = config["learner"]["num_steps"] if config["mode"] == "train" else 0
    except (ValueError, KeyError, OSError) as error:
        return name, "running" if holder(run.lock) else "unread", "", "", "", "", first_line(error)
    step = rows[-1]["step"] if rows else 0
    if run.result.exists():
        state = "done"
    elif holder(run.lock):
        state = "running"
    else:
        state = "failed" if last_error(run) else "stopped"
    times = [row[metrics.seconds("step")] for row in rows if metrics.seconds("step") in row][-NUM_TIMED:]
    left = format_duration((num_steps - step) * fmean(times)) if times and state == "running" else ""
    return (
        name,
        state,
        f"{step} of {num_steps}",
        _accuracy(rows),
        _newest(rows, metrics.LOSS, "{:.4g}"),
        _newest(rows, metrics.TOKENS_PER_S, "{:,.0f}"),
        left,
    )


def _newest(rows: list[dict[str, Any]], name: str, form: str) -> str:
    """The newest value of a metric; empty if no row has it."""
    return next((form.format(row[name]) for row in reversed(rows) if row.get(name) is not None), "")


def _accuracy(rows: list[dict[str, Any]]) -> str:
    """ "math500/mean@4 61.5 % (step 20)": the first accuracy of the newest evaluation of the student."""
    for row in reversed(rows):
        for name, value in metrics.of_stage(row, metrics.EVAL).items():
            if metrics.standard_error_of(metrics.EVAL + name) in row and not name.endswith(metrics.SEQ_KL):
                return f"{name} {100 * value:.1f} % (step {row['step']})" if value is not None else ""
    return ""
