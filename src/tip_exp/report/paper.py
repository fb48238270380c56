"""The paper's tables: its rows and columns, our number over the paper's, and missing runs shown as missing."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from tip_exp.report.arms import ArmResult, differing_keys, group_by
from tip_exp.report.tables import Table
from tip_exp.utils.paths import paper_numbers_file

# Labels of our pairs -> the paper's pairs in paper_numbers.csv.
PAIRS = {
    "qwen3_8b_to_4b": "qwen3-8b-4b",
    "llama3_70b_to_8b": "llama-70b-8b",
    "qwen25_14b_to_1p5b": "qwen2.5-14b-1.5b",
    "qwen3_14b_to_1p7b": "qwen3-14b-1.7b",
    "qwen3_32b_to_1p7b": "qwen3-32b-1.7b",
}
BENCHMARKS = {"math500": "MATH-500", "aime24": "AIME 2024", "aime25": "AIME 2025", "deepplanning": "DeepPlanning"}
PAPER_BENCHMARKS = {"deepplanning": "deepplanning_avg16"}  # our benchmark -> its name in paper_numbers.csv, if another
METHODS = {
    "full": "Full (all tokens)",
    "entropy_sample": "Entropy sampling",
    "soft_or": "Soft-OR",
    "soft_or_bottom": "Soft-OR, lowest",
    "q3": "Q3-only",
    "divergence": "Divergence-only",
}
FULL = ("full", 1.0)
SOFT_OR, ENTROPY = (("soft_or", 0.5), ("soft_or", 0.2)), (("entropy_sample", 0.5), ("entropy_sample", 0.2))
FIRST_COLUMNS = ["method", "ρ", "", "n"]
DIFFERENCE_COLUMNS = ["method", "ρ", "benchmark", "Δ points", "95 % interval", "p", "p (Holm)", "interval is over"]


@dataclass(frozen=True, slots=True)
class Layout:
    """A table's rows (selector label, retention) in the paper's order; `memory`: it has a column of peak memory."""

    title: str
    rows: tuple[tuple[str, float], ...]
    memory: bool = False


LAYOUTS = {
    "table3": Layout("Table 3: entropy sampling", (FULL, *ENTROPY, ("entropy_sample", 0.1)), memory=True),
    "table4": Layout("Table 4: overconfident tokens alone (Q3)", (FULL, ("q3", 0.2), ("q3", 0.1)), memory=True),
    "table5": Layout("Table 5 and Figure 1: entropy against Soft-OR", (FULL, *ENTROPY, *SOFT_OR)),
    "table6": Layout("Table 6: highest against lowest Soft-OR", (FULL, ("soft_or", 0.5), ("soft_or_bottom", 0.5))),
    "table7": Layout("Table 7: DeepPlanning", (FULL, *ENTROPY, ("q3", 0.2), *SOFT_OR)),
    "table8": Layout("Table 8: divergence alone", (FULL, ("divergence", 0.5), ("divergence", 0.1))),
}


@cache
def paper_numbers() -> dict[tuple[str, str, str, float], tuple[float, float]]:
    """(pair, benchmark, method, retention) -> (mean, standard deviation), % or GB, as printed; nan if not printed."""
    with paper_numbers_file().open(encoding="utf-8", newline="") as file:
        return {
            (row["pair"], row["benchmark"], row["method"], float(row["retention"])): (
                float(row["mean"]),
                float(row["std"] or "nan"),
            )
            for row in csv.DictReader(file)
        }


def paper_tables(name: str, arms: list[ArmResult]) -> list[Table]:
    """The table of the paper for each setting that has a run of it, followed by the differences to the baseline.

    A table never mixes settings (everything but selector and seed); if a pair has several, the title says which keys
    tell them apart.
    """
    layout = LAYOUTS[name]
    wanted = set(layout.rows) - {FULL}
    by_setting = group_by(arms, "setting")
    settings = dict.fromkeys(arm.setting for arm in arms if (arm.selector, arm.retention) in wanted)
    blocks = [by_setting[setting] for setting in settings]
    tables: list[Table] = []
    for block in blocks:
        configs = [peer[0].config for peer in blocks if peer[0].pair == block[0].pair]
        title_keys = [key for key in differing_keys(configs) if not key.startswith("selector.")]
        tables += _block_tables(layout, block, title_keys)
    return tables


def _block_tables(layout: Layout, block: list[ArmResult], title_keys: list[str]) -> list[Table]:
    setting = ", ".join(f"{key}={block[0].config.get(key)}" for key in title_keys)
    title = f"{layout.title}. {block[0].pair}" + (f" ({setting})" if setting else "")
    benchmarks = list(group_by(block, "benchmark"))
    headings = [*FIRST_COLUMNS, *(BENCHMARKS.get(name, name) for name in benchmarks)]
    headings += ["peak GiB (paper: GB)"] if layout.memory else []
    rows: list[list[str]] = []
    means: list[list[float]] = []  # for each row, by benchmark; nan in the paper's rows
    differences: list[list[str]] = []
    for selector, retention in layout.rows:
        arms = [arm for arm in block if (arm.selector, arm.retention) == (selector, retention)]
        by_identity = list(group_by(arms, "identity").values()) or [[]]
        for arm in by_identity:
            label = METHODS[selector] + (f" ({arm[0].differs})" if len(by_identity) > 1 else "")
            by_benchmark = {result.benchmark: result for result in arm}
            results = [by_benchmark.get(name) for name in benchmarks]
            cells = [_accuracy_text(result) for result in results] + ([_memory_text(arm)] if layout.memory else [])
            rows.append([label, f"{100 * retention:g} %", "ours", _seeds_text(arm), *cells])
            means.append([result.final.mean if result else math.nan for result in results])
            differences += [
                [label, f"{100 * retention:g} %", BENCHMARKS.get(result.benchmark, result.benchmark), *texts]
                for result in arm
                if (texts := _difference_texts(result))
            ]
        if cells := _paper_cells(PAIRS.get(block[0].pair, ""), benchmarks, selector, retention, layout.memory):
            rows.append(["", "", "paper", "", *cells])
            means.append([math.nan] * len(benchmarks))
    notes = [f"Sweeps: {_joined(arm.sweeps for arm in block) or 'single runs'}. "]
    notes[0] += f"Hardware: {_joined((arm.hardware for arm in block), '; ') or 'none yet'}."
    if any("missing" in row or "unfinished" in row for row in rows):
        notes.insert(0, "missing: no run of that row was found; unfinished: it was started and has no result.")
    tables = [Table(title, headings, rows, _best(means), _method_starts(rows), notes)]
    if differences:
        tables.append(Table(f"{title}: difference to all tokens", DIFFERENCE_COLUMNS, differences))
    return tables


def _accuracy_text(result: ArmResult | None) -> str:
    return "missing" if result is None else result.final.percent() if result.seeds else "unfinished"


def _memory_text(arm: list[ArmResult]) -> str:
    if not arm:
        return "missing"
    return "unfinished" if math.isnan(arm[0].peak_gib) else f"{arm[0].peak_gib:.2f}"


def _seeds_text(arm: list[ArmResult]) -> str:
    if not arm:
        return "0"
    seeds, runs = arm[0].seeds, arm[0].runs
    return str(seeds) if seeds == runs else f"{seeds} of {runs}"


def _paper_cells(pair: str, benchmarks: list[str], selector: str, retention: float, memory: bool) -> list[str]:
    """The paper's numbers; empty if it has none for this pair."""
    names = [PAPER_BENCHMARKS.get(name, name) for name in benchmarks] + (["peak_memory"] if memory else [])
    numbers = [paper_numbers().get((pair, name, selector, retention)) for name in names]
    if not any(numbers):
        return []
    return [_paper_text(*number) if number else "-" for number in numbers]


def _paper_text(mean: float, deviation: float) -> str:
    return f"{mean:g}" if math.isnan(deviation) else f"{mean:g} ± {deviation:g}"


def _difference_texts(result: ArmResult) -> list[str]:
    if (difference := result.difference) is None:
        return []
    scope = "problems and seeds" if difference.with_seeds else "problems (one seed)"
    interval = f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return [f"{100 * difference.mean:+.1f}", interval, f"{difference.p:.4f}", f"{result.p_holm:.4f}", scope]


def _best(means: list[list[float]]) -> frozenset[tuple[int, int]]:
    """Cells with the highest of our accuracies of each benchmark; ties are all best."""
    best: set[tuple[int, int]] = set()
    for column, values in enumerate(zip(*means, strict=True), start=len(FIRST_COLUMNS)):
        top = max((value for value in values if not math.isnan(value)), default=math.nan)
        best |= {(i, column) for i, value in enumerate(values) if value == top}
    return frozenset(best)


def _method_starts(rows: list[list[str]]) -> frozenset[int]:
    """Rows where the method changes."""
    starts = [i for i, row in enumerate(rows) if row[0]]
    return frozenset(i for before, i in pairwise(starts) if rows[i][0] != rows[before][0])


def _joined(lists: Iterable[list[str]], separator: str = ", ") -> str:
    return separator.join(sorted({name for names in lists for name in names}))
