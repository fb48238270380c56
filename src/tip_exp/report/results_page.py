"""`tip-report results`: one README of every table that run folders can fill, how to make it, and what is not filled.

Nothing is typed by hand: numbers, seeds, hardware, versions, revisions and commands come from the run folders, the
paper's numbers from results/paper_numbers.csv. Each sweep also gets its tables as Markdown, CSV and LaTeX.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (pandas types a column of a frame as a Series, a frame or anything)
from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tip_exp.records.reader import RunRecord
from tip_exp.report.arms import runs_frame, summarize
from tip_exp.report.overview import SAMPLES, csv_frame, overview
from tip_exp.report.paper import BENCHMARKS, LAYOUTS, METHODS, PAIRS, THEIRS, paper_numbers, paper_tables
from tip_exp.report.tables import Table, latex, markdown, write

SINGLE = "single runs"  # the heading of runs that belong to no sweep
SWEPT = ("seed=", "selector=", "selector.")  # overrides that a sweep's own file and the seeds give


def write_results(records: list[RunRecord], out: Path, command: str) -> None:
    """Write `out`/README.md, and for each sweep its tables to `out`/demo or `out`/paper."""
    by_sweep: dict[str, list[RunRecord]] = {}
    for record in records:
        by_sweep.setdefault(record.config["sweep"] or SINGLE, []).append(record)
    sections = []
    for sweep in sorted(by_sweep, key=lambda name: (name == SINGLE, name.startswith("demo"), name)):
        summary = summarize(runs_frame(by_sweep[sweep]))
        tables = sweep_tables(sweep, summary)
        text = "\n\n".join(markdown(table) for table in tables)
        sections.append(f"## {sweep}\n\n{text}\n\n{_facts(sweep, by_sweep[sweep])}")
        if sweep != SINGLE:
            place = out / ("demo" if sweep.startswith("demo") else "paper") / sweep
            write(place.with_suffix(".md"), f"{text}\n\n{SAMPLES}\n")
            write(place.with_suffix(".tex"), "\n\n".join(latex(table) for table in tables) + "\n")
            write(place.with_suffix(".csv"), csv_frame(summary).to_csv(index=False))
    notes = "\n".join(f"- {line}" for line in SAMPLES.splitlines())
    head = (
        f"# Results\n\nGenerated from run folders by `{command}`; do not edit. What did not work is in LOG.md.\n\n"
        f"{notes}\n- Our number stands over the paper's where the paper has one."
    )
    unfilled = markdown(unfilled_cells(summarize(runs_frame(records))))
    tail = f"## What remains unfilled, and why\n\n{unfilled}\n\n{_machines(records)}"
    write(out / "README.md", "\n\n".join([head, *sections, tail]) + "\n")


def sweep_tables(sweep: str, summary: pd.DataFrame) -> list[Table]:
    """In the paper's layout if the sweep has a table's name (table5, demo_table5), else a row an arm."""
    layout = sweep.removeprefix("demo_")
    tables = paper_tables(layout, summary) if layout in LAYOUTS else []
    return tables or [overview(summary)]


def unfilled_cells(summary: pd.DataFrame) -> Table:
    """The paper's tables by pair: how many of its accuracies have one of ours beside them, and why others do not."""
    ours = {
        (PAIRS.get(row["pair"]), THEIRS.get(row["benchmark"], row["benchmark"]), row["selector"], row["retention"]): row
        for _, row in summary.iterrows()
    }
    labels = {paper: label for label, paper in PAIRS.items()}
    benchmarks = {THEIRS.get(name, name) for name in BENCHMARKS}
    rows: list[list[str]] = []
    for name, layout in LAYOUTS.items():
        wanted = [
            (pair, benchmark, *arm)
            for (pair, benchmark, *arm) in paper_numbers()
            if benchmark in benchmarks and tuple(arm) in layout.rows and _has_table(pair, name)
        ]
        for pair in dict.fromkeys(cell[0] for cell in wanted):
            cells = [cell for cell in wanted if cell[0] == pair]
            filled = [cell for cell in cells if cell in ours and ours[cell]["seeds"]]
            if len(filled) < len(cells):
                why = _why(cells, ours)
                rows.append([layout.title, labels[pair], f"{len(filled)} of {len(cells)}", why, f"`{_to_fill(name)}`"])
    return Table("", ["table", "pair", "filled", "why not", "command"], rows)


def _has_table(pair: str, name: str) -> bool:
    """Does the paper print this table for this pair? Of its own rows, not of those it repeats from another table."""
    own = {"table4": "q3", "table5": "soft_or", "table6": "soft_or_bottom", "table8": "divergence"}
    agentic = any(benchmark.startswith("deepplanning") for (of, benchmark, *_) in paper_numbers() if of == pair)
    if (name == "table7") != agentic:
        return False
    needed = own.get(name, "full")
    return any(of == pair and method == needed for (of, _, method, _) in paper_numbers())


def _why(cells: list[tuple[Any, ...]], ours: dict[tuple[Any, ...], Any]) -> str:
    started = [cell for cell in cells if cell in ours]
    if not started:
        return "no run of this pair and data was found"
    missing = list(dict.fromkeys(cell[2:] for cell in cells if cell not in ours))
    begun = list(dict.fromkeys(cell[2:] for cell in started if not ours[cell]["seeds"]))
    parts = [f"no run of {_arms(missing)}"] if missing else []
    parts += [f"unfinished: {_arms(begun)}"] if begun else []
    return "; ".join(parts)


def _arms(arms: list[tuple[str, float]]) -> str:
    return ", ".join(f"{METHODS[selector]} {100 * retention:g} %" for selector, retention in arms)


def _to_fill(name: str) -> str:
    return f"tip-exp -cd sweeps -cn {name}" + (" data.root=FOLDER" if name == "table7" else "")


def _facts(sweep: str, records: list[RunRecord]) -> str:
    """A list: runs and seeds, hardware, versions, revision, dates, command."""
    done = [record.result for record in records if record.result is not None]
    linked = sum("reused_from" in result for result in done)
    seeds = sorted({record.config["seed"] for record in records if record.is_done})
    versions = [{"tip_exp": "unknown"} | result.get("versions", {}) for result in done]
    told = {
        "runs": f"{len(done)} of {len(records)} finished" + (f", {linked} linked from another sweep" if linked else ""),
        "seeds": ", ".join(map(str, seeds)) or "none",
        "hardware": _joined(result["hardware"] for result in done),
        "versions": _joined(", ".join(f"{name} {value}" for name, value in one.items()) for one in versions),
        "git revision": _joined(_revision(result) for result in done),
        "finished": _span([result["finished_at"][:10] for result in done]),
        "command": f"`{command_of(sweep, records)}`" if sweep != SINGLE else "each run's .hydra/overrides.yaml",
    }
    return "\n".join(f"- {name}: {value}" for name, value in told.items())


def command_of(sweep: str, records: list[RunRecord]) -> str:
    """The line that makes these runs: the sweep, its seeds, and what else was typed, as every run's folder tells."""
    seeds = ",".join(map(str, sorted({record.config["seed"] for record in records})))
    typed = [_overrides(Path(record.folder)) for record in records]
    common = [one for one in typed[0] if all(one in other for other in typed) and not one.startswith(SWEPT)]
    return shlex.join(["tip-exp", "-cd", "sweeps", "-cn", sweep, f"seed={seeds}", *common])


def _overrides(folder: Path) -> list[str]:
    path = folder / ".hydra" / "overrides.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []


def _revision(result: dict[str, Any]) -> str:
    """Short, with its + for a checkout that had changes."""
    revision = result.get("git_revision")
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]*", r"\1", revision) if revision else "installed, not a checkout"


def _machines(records: list[RunRecord]) -> str:
    known = {record.result["hardware"] for record in records if record.result is not None}
    graphics = [name for name in known if re.match(r"\d+ x ", name)]  # as result.json names GPUs
    if graphics:
        return f"GPUs among the machines of these runs: {_joined(graphics)}."
    return (
        "None of these runs was made on a GPU. The paper's pairs, with teachers of 8 to 70 billion parameters from the "
        "model hub, need them; the head of each file in sweeps/ estimates how many hours."
    )


def _span(dates: list[str]) -> str:
    return "not yet" if not dates else " to ".join(dict.fromkeys([min(dates), max(dates)]))


def _joined(texts: Any) -> str:
    return "; ".join(dict.fromkeys(sorted(texts))) or "none yet"
