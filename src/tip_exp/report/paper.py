"""The paper's tables: its rows and columns, our number over its number, and what is missing shown as missing."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (pandas types a column of a frame as a Series, a frame or anything)
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import pandas as pd

from tip_exp.report.arms import differing_keys
from tip_exp.report.significance import Difference
from tip_exp.report.tables import Table
from tip_exp.utils.paths import paper_numbers_file

# Our labels -> the paper's pairs, as paper_numbers.csv spells them.
PAIRS = {
    "qwen3_8b_to_4b": "qwen3-8b-4b",
    "llama3_70b_to_8b": "llama-70b-8b",
    "qwen25_14b_to_1p5b": "qwen2.5-14b-1.5b",
    "qwen3_14b_to_1p7b": "qwen3-14b-1.7b",
    "qwen3_32b_to_1p7b": "qwen3-32b-1.7b",
}
BENCHMARKS = {"math500": "MATH-500", "aime24": "AIME 2024", "aime25": "AIME 2025", "deepplanning": "DeepPlanning"}
THEIRS = {"deepplanning": "deepplanning_avg16"}  # our benchmark -> the paper's number, where the words differ
METHODS = {
    "full": "Full (all tokens)",
    "entropy_sample": "Entropy sampling",
    "soft_or": "Soft-OR",
    "soft_or_bottom": "Soft-OR, lowest",
    "q3": "Q3-only",
    "divergence": "Divergence-only",
}
FULL = ("full", 1.0)


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows (selector label, retention) of a table in the paper's order; does it have a column of memory?"""

    title: str
    rows: tuple[tuple[str, float], ...]
    memory: bool = False


LAYOUTS = {
    "table3": Layout(
        "Table 3: entropy sampling",
        (FULL, ("entropy_sample", 0.5), ("entropy_sample", 0.2), ("entropy_sample", 0.1)),
        memory=True,
    ),
    "table4": Layout("Table 4: overconfident tokens alone (Q3)", (FULL, ("q3", 0.2), ("q3", 0.1)), memory=True),
    "table5": Layout(
        "Table 5 and Figure 1: entropy against Soft-OR",
        (FULL, ("entropy_sample", 0.5), ("entropy_sample", 0.2), ("soft_or", 0.5), ("soft_or", 0.2)),
    ),
    "table6": Layout("Table 6: highest against lowest Soft-OR", (FULL, ("soft_or", 0.5), ("soft_or_bottom", 0.5))),
    "table7": Layout(
        "Table 7: DeepPlanning",
        (
            FULL,
            ("entropy_sample", 0.5),
            ("entropy_sample", 0.2),
            ("q3", 0.2),
            ("soft_or", 0.5),
            ("soft_or", 0.2),
        ),
    ),
    "table8": Layout("Table 8: divergence alone", (FULL, ("divergence", 0.5), ("divergence", 0.1))),
}


@cache
def paper_numbers() -> dict[tuple[str, str, str, float], tuple[float, float]]:
    """(pair, benchmark, method, retention) -> (mean, standard deviation), % or GB, as printed; nan: none given."""
    frame = pd.read_csv(paper_numbers_file())
    keys = frame[["pair", "benchmark", "method", "retention"]].itertuples(index=False, name=None)
    return dict(zip(keys, frame[["mean", "std"]].itertuples(index=False, name=None), strict=True))


def paper_tables(name: str, summary: pd.DataFrame) -> list[Table]:
    """The table of the paper once for each pair and setting that has a run of it, and its differences to the baseline.

    Settings (everything but selector and seed) are never mixed in one table; where a pair has several, the heading
    says which keys set them apart.
    """
    layout = LAYOUTS[name]
    wanted = set(layout.rows) - {FULL}
    mine = summary[[pair in wanted for pair in zip(summary["selector"], summary["retention"], strict=True)]]
    bases = list(dict.fromkeys(mine["base"]))
    blocks = [summary[summary["base"] == base] for base in bases]
    tables: list[Table] = []
    for block in blocks:
        rivals = [other.iloc[0]["config"] for other in blocks if other.iloc[0]["pair"] == block.iloc[0]["pair"]]
        tables += _block(layout, block, [key for key in differing_keys(rivals) if not key.startswith("selector.")])
    return tables


def _block(layout: Layout, block: pd.DataFrame, apart: list[str]) -> list[Table]:
    first = block.iloc[0]
    setting = ", ".join(f"{key}={first['config'].get(key)}" for key in apart)
    title = f"{layout.title}. {first['pair']}" + (f" ({setting})" if setting else "")
    benchmarks = list(dict.fromkeys(block["benchmark"]))
    headings = ["method", "ρ", "", "n", *(BENCHMARKS.get(name, name) for name in benchmarks)]
    if layout.memory:
        headings.append("peak GiB (paper: GB)")
    rows: list[list[str]] = []
    means: list[list[float]] = []
    notes: list[str] = []
    differences: list[list[str]] = []
    for selector, retention in layout.rows:
        arms = block[(block["selector"] == selector) & (block["retention"] == retention)]
        by_identity = list(dict.fromkeys(arms["same"])) or [None]
        for same in by_identity:
            arm = arms[arms["same"] == same]
            label = METHODS[selector] + (f" ({arm.iloc[0]['differs']})" if len(by_identity) > 1 else "")
            ours, values = _ours(arm, benchmarks, layout.memory)
            rows.append([label, f"{100 * retention:g} %", "ours", _seeds(arm), *ours])
            means.append(values)
            differences += [
                [label, f"{100 * retention:g} %", BENCHMARKS.get(row["benchmark"], row["benchmark"]), *_told(row)]
                for _, row in arm.iterrows()
                if row["difference"]
            ]
        theirs = _theirs(PAIRS.get(first["pair"], ""), benchmarks, selector, retention, layout.memory)
        if theirs:
            rows.append(["", "", "paper", "", *theirs])
            means.append([math.nan] * len(theirs))
    if any("missing" in row or "unfinished" in row for row in rows):
        notes.append("missing: no run of that row was found; unfinished: it was started and has no result.")
    hardware = sorted({name for names in block["hardware"] for name in names})
    notes.append(f"Sweeps: {_joined(block['sweeps'])}. Hardware: {'; '.join(hardware) or 'none yet'}.")
    tables = [
        Table(title, headings, rows, _best(means, len(benchmarks)), _starts(rows), notes),
    ]
    if differences:
        tables.append(
            Table(
                f"{title}: difference to all tokens",
                ["method", "ρ", "benchmark", "Δ points", "95 % interval", "p", "p (Holm)", "interval is over"],
                differences,
            )
        )
    return tables


def _ours(arm: pd.DataFrame, benchmarks: list[str], memory: bool) -> tuple[list[str], list[float]]:
    cells: list[str] = []
    means: list[float] = []
    by_benchmark = {row["benchmark"]: row for _, row in arm.iterrows()}
    for benchmark in benchmarks:
        row = by_benchmark.get(benchmark)
        final = row["final"] if row is not None and row["seeds"] else None
        cells.append(final.percent() if final else "missing" if row is None else "unfinished")
        means.append(final.mean if final else math.nan)
    if memory:
        peak = arm.iloc[0]["peak_gib"] if len(arm) else math.nan
        cells.append("missing" if not len(arm) else "unfinished" if math.isnan(peak) else f"{peak:.2f}")
        means.append(math.nan)
    return cells, means


def _theirs(pair: str, benchmarks: list[str], selector: str, retention: float, memory: bool) -> list[str]:
    """The paper's cells, or nothing for a pair it does not have."""
    names = [THEIRS.get(name, name) for name in benchmarks]
    numbers = [paper_numbers().get((pair, name, selector, retention)) for name in names]
    numbers += [paper_numbers().get((pair, "peak_memory", selector, retention))] if memory else []
    if not any(numbers):
        return []
    return ["-" if one is None else f"{one[0]:g}" + ("" if math.isnan(one[1]) else f" ± {one[1]:g}") for one in numbers]


def _seeds(arm: pd.DataFrame) -> str:
    if not len(arm):
        return "0"
    done, all_runs = arm.iloc[0]["seeds"], arm.iloc[0]["runs"]
    return str(done) if done == all_runs else f"{done} of {all_runs}"


def _told(row: Any) -> list[str]:
    found: Difference = row["difference"]
    scope = "problems and seeds" if found.with_seeds else "problems (one seed)"
    interval = f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return [f"{100 * found.mean:+.1f}", interval, f"{found.p:.4f}", f"{row['p_holm']:.4f}", scope]


def _best(means: list[list[float]], num_benchmarks: int) -> frozenset[tuple[int, int]]:
    """The highest of ours in each column of accuracies; equals are all best."""
    best: set[tuple[int, int]] = set()
    for column in range(num_benchmarks):
        values = [row[column] for row in means]
        top = max((value for value in values if not math.isnan(value)), default=math.nan)
        best |= {(i, column + 4) for i, value in enumerate(values) if value == top}
    return frozenset(best)


def _starts(rows: list[list[str]]) -> frozenset[int]:
    """Rows where another method begins: a rule above them."""
    starts = [i for i, row in enumerate(rows) if row[0]]
    return frozenset(i for before, i in pairwise(starts) if rows[i][0] != rows[before][0])


def _joined(sweeps: pd.Series) -> str:
    return ", ".join(sorted({name for names in sweeps for name in names})) or "single runs"
