"""The paper's tables: its rows and columns, our number over the paper's, and missing runs shown as missing."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from tip_exp.report.arms import ArmResult, differing_keys, distinctions, group_by
from tip_exp.report.columns import MARGIN, equivalence, errors_cover, p_value, percent, points, ratio
from tip_exp.report.overview import warnings
from tip_exp.report.tables import Table
from tip_exp.utils.paths import PAPER_PAIRS, paper_numbers_file

BENCHMARKS = {"math500": "MATH-500", "aime24": "AIME 2024", "aime25": "AIME 2025", "deepplanning": "DeepPlanning"}
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
FIRST_COLUMNS = ["method", "ρ", "source", "seeds"]
DIFFERENCE_COLUMNS = ["method", "ρ", "benchmark", "vs full [95 %]", "errors cover", "p (Holm)", f"within ± {MARGIN:g}"]
DIFFERENCE_COLUMNS += ["KL vs full [95 %]", "KL p (Holm)"]
OURS, STRICT, PAPER = "ours ± se", "ours, string grader", "paper ± as printed"
SOURCES = (
    f"{OURS}: graded by value, ± standard error over problems (one seed) or over problems and seeds. {STRICT}: the "
    f"same responses by the string comparison of the paper's base code. {PAPER}: graded by string comparison; the "
    "paper does not say what its ± is, so the two ± are not comparable."
)
MEMORY_SWEEPS = {"memory", "demo_memory"}
BACKENDS = ("fused", "materialized")
MEMORY_COLUMNS = [*(f"loss MiB, {backend}" for backend in BACKENDS), "peak GB of the paper"]


@dataclass(frozen=True, slots=True)
class Layout:
    """A table's rows (selector label, retention) in the paper's order; `memory`: it has columns of memory."""

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


class Cell(NamedTuple):
    """What a number of the paper measures, in our labels; the benchmark "peak_memory" stands for memory."""

    pair: str
    benchmark: str
    selector: str
    retention: float


class PaperNumber(NamedTuple):
    """A number as printed, "76.7 ± 0.7" in % or GB, and the first table that prints it."""

    table: str
    text: str


@cache
def paper_numbers() -> dict[Cell, PaperNumber]:
    numbers: dict[Cell, PaperNumber] = {}
    with paper_numbers_file().open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            benchmark = row["benchmark"].removesuffix("_avg16")  # DeepPlanning's; its best16 is no accuracy of ours
            cell = Cell(PAPER_PAIRS[row["pair"]], benchmark, row["method"], float(row["retention"]))
            deviation = f" ± {float(row['std']):g}" if row["std"] else ""
            numbers[cell] = PaperNumber(row["table"], f"{float(row['mean']):g}{deviation}")
    return numbers


def paper_tables(name: str, arms: list[ArmResult], measured: list[ArmResult]) -> list[Table]:
    """The table of the paper for each setting that has a run of it, followed by the differences to the baseline.

    A table never mixes settings (everything but selector and seed); if a pair has several, the title says which keys
    tell them apart. Memory is looked up in `measured`, which may be all arms: it comes from the memory sweeps alone.
    """
    layout = LAYOUTS[name]
    wanted = set(layout.rows) - {FULL}
    arms = [arm for arm in arms if arm.is_trained and not measures_memory(arm)]
    by_setting = group_by(arms, "setting")
    settings = dict.fromkeys(arm.setting for arm in arms if (arm.selector, arm.retention) in wanted)
    blocks = [by_setting[setting] for setting in settings]
    tables: list[Table] = []
    for block in blocks:
        peers = [peer[0] for peer in blocks if peer[0].pair == block[0].pair]
        setting = ", ".join(block[0].values_of(differing_keys(peers, ignored=("selector.",))))
        title = f"{layout.title}. {block[0].pair}" + (f" ({setting})" if setting else "")
        memory = {
            (arm.selector, arm.retention, arm.config["learner.loss_backend"]): f"{arm.loss_mib:.1f}"
            for arm in measured
            if measures_memory(arm) and arm.pair == block[0].pair and arm.seeds
        }
        tables += _block_tables(layout, title, block, memory if layout.memory else None)
    return tables


def measures_memory(arm: ArmResult) -> bool:
    """Whether only sweeps of MEMORY_SWEEPS have runs of this arm."""
    return bool(arm.sweeps) and set(arm.sweeps) <= MEMORY_SWEEPS


def _block_tables(
    layout: Layout, title: str, block: list[ArmResult], memory: dict[tuple[str, float, str], str] | None
) -> list[Table]:
    """`memory`: MiB of the loss by selector, retention and backend; None for a table without memory."""
    benchmarks = list(group_by(block, "benchmark"))
    block = sorted(block, key=lambda arm: benchmarks.index(arm.benchmark))
    rows: list[list[str]] = []
    arms: dict[int, list[ArmResult]] = {}  # the results of our rows, one per benchmark; empty if there is no run
    differences: list[list[str]] = []
    width = len(MEMORY_COLUMNS) if memory is not None else 0
    for selector, retention in layout.rows:
        same_selector = [arm for arm in block if (arm.selector, arm.retention) == (selector, retention)]
        by_identity = list(group_by(same_selector, "identity").values()) or [[]]
        mib = [(memory or {}).get((selector, retention, backend), "-") for backend in BACKENDS] + ["-"]
        differs = distinctions([arm[0] for arm in by_identity if arm]) or [""]
        for arm, text in zip(by_identity, differs, strict=True):
            label = METHODS[selector] + (f" ({text})" if text else "")
            method = [label, f"{100 * retention:g} %"]
            arms[len(rows)] = arm
            rows.append([*method, OURS, *_our_cells(arm, len(benchmarks)), *mib[:width]])
            strict = [f"{100 * result.strict:.1f}" if not math.isnan(result.strict) else "-" for result in arm]
            if set(strict) - {"-"}:
                rows.append(["", "", STRICT, "", *strict, *["-"] * width])
            differences += [[*method, *cells] for result in arm if (cells := _difference_cells(result))]
        if cells := _paper_cells(block[0].pair, benchmarks, selector, retention, width):
            rows.append(["", "", PAPER, "", *cells])
    headings = [*FIRST_COLUMNS, *(BENCHMARKS.get(name, name) for name in benchmarks), *MEMORY_COLUMNS[:width]]
    sweeps = ", ".join(sorted({name for arm in block for name in arm.sweeps})) or "single runs"
    hardware = "; ".join(sorted({name for arm in block for name in arm.hardware})) or "none yet"
    notes = [SOURCES, f"Sweeps: {sweeps}. Hardware: {hardware}."]
    if any("missing" in row or "unfinished" in row for row in rows):
        notes.insert(0, "missing: no run of that row was found; unfinished: it was started and has no result.")
    if memory is not None:
        absent = "" if memory else "; no such run is among these records"
        notes.append(
            f"loss MiB: peak allocation of the loss in the runs of {' and '.join(sorted(MEMORY_SWEEPS))}{absent}. The "
            "paper's GB are the whole peak of a GPU."
        )
    method_starts = frozenset(i for before, i in pairwise(arms) if rows[i][0] != rows[before][0])
    tables = [Table(title, headings, rows, _best(arms, len(benchmarks)), method_starts, notes + warnings(block))]
    if differences:
        tables.append(Table(f"{title}: difference to all tokens", DIFFERENCE_COLUMNS, differences))
    return tables


def _our_cells(arm: list[ArmResult], num_benchmarks: int) -> list[str]:
    """Number of seeds and accuracies."""
    if not arm:
        return ["0"] + ["missing"] * num_benchmarks
    seeds, runs = arm[0].seeds, arm[0].runs
    cells = [percent(result.final) for result in arm] if seeds else ["unfinished"] * num_benchmarks
    return [str(seeds) if seeds == runs else f"{seeds} of {runs}", *cells]


def _paper_cells(pair: str, benchmarks: list[str], selector: str, retention: float, width: int) -> list[str]:
    """The paper's numbers; empty if it has none for this pair. `width` columns of memory end with the paper's."""
    names = benchmarks + (["peak_memory"] if width else [])
    numbers = [paper_numbers().get(Cell(pair, name, selector, retention)) for name in names]
    texts = [number.text if number else "-" for number in numbers]
    return [*texts[: len(benchmarks)], *["-"] * (width - 1), *texts[len(benchmarks) :]] if any(numbers) else []


def _difference_cells(result: ArmResult) -> list[str]:
    """The columns of DIFFERENCE_COLUMNS after the retention; empty if the result is compared with none."""
    if result.difference is None:
        return []
    benchmark = BENCHMARKS.get(result.benchmark, result.benchmark)
    return [
        benchmark,
        points(result.difference),
        errors_cover(result),
        p_value(result.p_holm),
        equivalence(result.difference),
        ratio(result.kl_difference),
        p_value(result.kl_p_holm),
    ]


def _best(arms: dict[int, list[ArmResult]], num_benchmarks: int) -> frozenset[tuple[int, int]]:
    """Cells with the highest of our accuracies of each benchmark; ties are all best."""
    best: set[tuple[int, int]] = set()
    for k in range(num_benchmarks):
        means = {i: arm[k].final.mean for i, arm in arms.items() if arm and not math.isnan(arm[k].final.mean)}
        top = max(means.values(), default=math.nan)
        best |= {(i, len(FIRST_COLUMNS) + k) for i, mean in means.items() if mean == top}
    return frozenset(best)
