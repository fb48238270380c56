"""`tip-report results`: one README with all tables that run folders can fill, their commands, and what is missing.

Everything is generated: numbers, seeds, hardware, versions, revisions and commands come from the run folders, the
paper's numbers from results/paper_numbers.csv. The tables of each sweep are also written as Markdown, CSV and LaTeX.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tip_exp.records.reader import RunRecord
from tip_exp.report.arms import ArmResult, summarize
from tip_exp.report.overview import NOTES, csv_text, overview
from tip_exp.report.paper import BENCHMARKS, LAYOUTS, METHODS, PAIRS, Cell, paper_numbers, paper_tables
from tip_exp.report.tables import Table, latex, markdown, write

SINGLE = "single runs"  # the heading of runs that belong to no sweep
SWEPT = ("seed=", "selector=", "selector.")  # overrides that come from the sweep's file or the list of seeds


def write_results(records: list[RunRecord], out: Path, command: str) -> None:
    """Write `out`/README.md, and the tables of each sweep to `out`/demo or `out`/paper."""
    by_sweep: dict[str, list[RunRecord]] = {}
    for record in records:
        by_sweep.setdefault(record.config["sweep"] or SINGLE, []).append(record)
    everything = summarize(records)
    sections = []
    for sweep in sorted(by_sweep, key=lambda name: (name == SINGLE, name.startswith("demo"), name)):
        arms = summarize(by_sweep[sweep])
        tables = sweep_tables(sweep, arms, everything)
        text = "\n\n".join(map(markdown, tables))
        sections.append(f"## {sweep}\n\n{text}\n\n{_facts(sweep, by_sweep[sweep])}")
        if sweep != SINGLE:
            stem = out / ("demo" if sweep.startswith("demo") else "paper") / sweep
            write(stem.with_suffix(".md"), f"{text}\n\n{NOTES}\n")
            write(stem.with_suffix(".tex"), "\n\n".join(map(latex, tables)) + "\n")
            write(stem.with_suffix(".csv"), csv_text(arms))
    notes = "\n".join(f"- {line}" for line in NOTES.splitlines())
    head = (
        f"# Results\n\nGenerated from run folders by `{command}`; do not edit. Negative results are in LOG.md.\n\n"
        f"{notes}\n- Our number stands over the paper's where the paper has one."
    )
    missing = markdown(unfilled_cells(everything))
    tail = f"## What is not filled, and why\n\n{missing}\n\n{_hardware_note(records)}"
    write(out / "README.md", "\n\n".join([head, *sections, tail]) + "\n")


def sweep_tables(sweep: str, arms: list[ArmResult], everything: list[ArmResult]) -> list[Table]:
    """In the paper's layout if the sweep is named like a table (table5, demo_table5), else one row per arm.

    `everything`: the arms of all sweeps, where memory is looked up.
    """
    layout = sweep.removeprefix("demo_")
    tables = paper_tables(layout, arms, everything) if layout in LAYOUTS else []
    return tables or [overview(arms)]


def unfilled_cells(arms: list[ArmResult]) -> Table:
    """The paper's tables by pair: how many of its accuracies we have, and why the others are missing."""
    results = {Cell(arm.pair, arm.benchmark, arm.selector, arm.retention): arm for arm in arms}
    numbers = paper_numbers()
    printed = {(number.table, cell.pair) for cell, number in numbers.items()}
    rows: list[list[str]] = []
    for name, layout in LAYOUTS.items():
        accuracies = [cell for cell in numbers if cell[2:] in layout.rows and cell.benchmark in BENCHMARKS]
        command = f"`tip-exp -cd sweeps -cn {name}{' data.root=FOLDER' if name == 'table7' else ''}`"
        for pair in PAIRS.values():
            cells = [cell for cell in accuracies if cell.pair == pair]
            num_filled = sum(cell in results and results[cell].seeds > 0 for cell in cells)
            if (name, pair) in printed and num_filled < len(cells):
                rows.append([layout.title, pair, f"{num_filled} of {len(cells)}", _why(cells, results), command])
    return Table("", ["table", "pair", "filled", "why not", "command"], rows)


def _why(cells: list[Cell], results: dict[Cell, ArmResult]) -> str:
    missing = [_arm_name(cell) for cell in cells if cell not in results]
    if len(missing) == len(cells):
        return "no run of this pair and data was found"
    unfinished = [_arm_name(cell) for cell in cells if cell in results and not results[cell].seeds]
    parts = {"no run of ": missing, "unfinished: ": unfinished}
    return "; ".join(reason + ", ".join(dict.fromkeys(names)) for reason, names in parts.items() if names)


def _arm_name(cell: Cell) -> str:
    return f"{METHODS[cell.selector]} {100 * cell.retention:g} %"


def _facts(sweep: str, records: list[RunRecord]) -> str:
    """A list: runs and seeds, hardware, versions, revision, dates, command."""
    results = [record.result for record in records if record.result is not None]
    linked = sum("reused_from" in result for result in results)
    seeds = sorted({record.config["seed"] for record in records if record.is_done})
    dates = sorted(result["finished_at"][:10] for result in results)
    facts = {
        "runs": f"{len(results)} of {len(records)} finished" + (f", {linked} linked from another sweep" * bool(linked)),
        "seeds": ", ".join(map(str, seeds)) or "none",
        "hardware": _joined(result["hardware"] for result in results),
        "versions": _joined(
            ", ".join(f"{name} {version}" for name, version in result["versions"].items()) for result in results
        ),
        "git revision": _joined(_revision(result) for result in results),
        "finished": " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "not yet",
        "command": f"`{command_of(sweep, records)}`" if sweep != SINGLE else "in each run's .hydra/overrides.yaml",
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def command_of(sweep: str, records: list[RunRecord]) -> str:
    """The command that makes these runs: the sweep, its seeds, and the overrides that all runs have in common."""
    seeds = ",".join(map(str, sorted({record.config["seed"] for record in records})))
    files = [Path(record.folder, ".hydra", "overrides.yaml") for record in records]
    overrides = [yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else [] for path in files]
    common = [
        text for text in overrides[0] if not text.startswith(SWEPT) and all(text in of_run for of_run in overrides)
    ]
    return shlex.join(["tip-exp", "-cd", "sweeps", "-cn", sweep, f"seed={seeds}", *common])


def _revision(result: dict[str, Any]) -> str:
    """The first 12 digits, with the + of a checkout that had changes."""
    revision = result["git_revision"]
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]*", r"\1", revision) if revision else "installed, not a checkout"


def _hardware_note(records: list[RunRecord]) -> str:
    hardware = [record.result["hardware"] for record in records if record.result is not None]
    if gpus := [name for name in hardware if re.match(r"\d+ x ", name)]:  # records/result.py names GPUs so
        return f"Runs on GPUs: {_joined(gpus)}."
    return (
        "No run used a GPU. The paper's pairs, with teachers of 8 to 70 billion parameters from the model hub, need "
        "GPUs; the first lines of each file in sweeps/ estimate the hours."
    )


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(sorted(set(texts))) or "none yet"
