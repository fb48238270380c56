"""Arm results as tables of text, one row per arm and benchmark, and as CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tip_exp.report.arms import ArmResult, differing_keys, distinctions, group_by, setting_names
from tip_exp.report.columns import COLUMNS, LEGEND, NAMES, column_name
from tip_exp.report.significance import Estimate
from tip_exp.report.tables import Table
from tip_exp.utils.errors import DataError

SAME_TOKENS = 0.9  # Jaccard index with top entropy from which a note says so
ACCURACIES = ("teacher", "start", "final", "greedy")
CSV_COLUMNS = (
    "pair", "data", "benchmark", "selector", "retention", "seeds", "runs", "sweeps", "hardware", *ACCURACIES,
    "strict", "gap_closed", "seq_kl", "kept_tokens", "kept_frac", "q3_kept_frac", "overlap_entropy", "loss_mib",
    "peak_gib", "process_gib", "wall_s", "no_tool_baseline", "state", "p_holm", "kl_p_holm", "differs",
)  # fmt: skip
DIFFERENCES = {"difference": ("low", "high", "p", "margin", "over_seeds"), "kl_difference": ("low", "high", "p")}
SHARED = ("teacher", "step 0", "errors cover")  # a line below the table says it if all rows have the same
COMPACT = (
    "benchmark", "selector", "retention", "kept", "seeds", "no-tool baseline", *SHARED, "final", "greedy",
    "vs full", "p", "KL/response", "loss MiB", "seconds", "state", "differs in",
)  # fmt: skip


def overview(arms: list[ArmResult], columns: Sequence[str] = tuple(NAMES), title: str = "") -> Table:
    """One row per arm and benchmark, with the columns of these names that say something.

    What all rows share is a note. Raises DataError for a name that is not in NAMES.
    """
    for name in columns:
        if name not in NAMES:
            raise DataError(f"there is no column {name!r}; columns are {', '.join(NAMES)}")
    text = {name: [COLUMNS[NAMES[name]](arm) for arm in arms] for name in NAMES}
    text["differs in"] = distinctions(arms)
    finished = [i for i, arm in enumerate(arms) if arm.seeds]
    shared = {name: text[name][finished[0]] for name in SHARED if len({text[name][i] for i in finished}) == 1}
    is_shown = {
        "pair": len(set(text["pair"])) > 1,
        "benchmark": len(set(text["benchmark"])) > 1,
        "state": any(arm.seeds < arm.runs for arm in arms),
        "differs in": any(text["differs in"]),
    } | dict.fromkeys(shared, False)
    measured = ("Q3 kept", "no-tool baseline", "p", "within", "KL/response", "KL vs full", "KL p")
    is_shown |= {name: set(text[name]) != {"-"} for name in measured}
    shown = [name for name in columns if is_shown.get(name, True)]
    covered = shared.pop("errors cover", "")
    same = ", ".join(f"{name} {value}" for name, value in shared.items())
    notes = [f"All rows: {same} (% ± standard error over problems)."] if same else []
    notes += [f"Errors and intervals cover {covered}."] if covered else []
    rows = [list(row) for row in zip(*(text[name] for name in shown), strict=True)]
    return Table(title, [NAMES[name] for name in shown], rows, notes=notes + warnings(arms))


def overviews(arms: list[ArmResult], columns: Sequence[str] = COMPACT) -> list[Table]:
    """A table for each setting, which is everything but the selector, then one of the evaluations without training."""
    groups = list(group_by([arm for arm in arms if arm.is_trained], "setting").values())
    tables = [overview(group, columns, name) for group, name in zip(groups, setting_names(groups), strict=True)]
    evaluated = [arm for arm in arms if not arm.is_trained]
    if evaluated:
        of_arm = {"run": lambda arm: Path(arm.folders[0]).name, "student": lambda arm: arm.config["pair.student.path"]}
        of_arm |= {NAMES[name]: COLUMNS[NAMES[name]] for name in ("benchmark", "teacher", "final", "greedy", "state")}
        rows = [[text(arm) for text in of_arm.values()] for arm in evaluated]
        tables.append(Table("Evaluations without training", list(of_arm), rows, notes=warnings(evaluated)))
    return tables


def legend(tables: list[Table]) -> str:
    """What the columns of these tables mean, a line each."""
    shown = {column_name(heading) for table in tables for heading in table.headings}
    return "\n".join(text for names, text in LEGEND.items() if shown & set(names))


def held_out(arms: list[ArmResult]) -> list[str]:
    """A sentence for each benchmark of whose test problems the training set holds some.

    Travel tasks have none: runs of earlier versions compared their queries, whose answers differ with their tables.
    """
    texts: list[str] = []
    for benchmark, of_benchmark in group_by(arms, "benchmark").items():
        whole, ngram = (max(arm.in_train[i] for arm in of_benchmark) for i in (0, 1))
        is_travel = of_benchmark[0].config.get(f"eval.benchmarks.{benchmark}.kind") == "travel"
        if (whole or ngram) and not is_travel:
            texts.append(
                f"{benchmark}: {whole} of its test problems are in the training set; {ngram} more share most of their "
                "13-grams with training problems. Accuracies on them are not held out."
            )
    return texts


def warnings(arms: list[ArmResult]) -> list[str]:
    """What a reader must know: test problems that were trained on, runs that are unlike the others or not healthy,
    and selectors that equal top entropy.
    """
    texts = held_out(arms)
    for kind, seen in (
        ("git revisions", [arm.revisions for arm in arms]),
        ("machines", [arm.hardware for arm in arms]),
    ):
        if len(values := sorted({value for of_arm in seen for value in of_arm})) > 1:
            texts.append(f"These runs are of several {kind}: {'; '.join(values)}.")
    if unpaired := [arm.name for arm in arms if not arm.is_paired]:
        texts.append(
            f"Compared with all tokens without pairing, since the seeds differ: {', '.join(dict.fromkeys(unpaired))}. "
            "Their intervals are wider for it."
        )
    texts += [
        f"Runs left out of {arm.name} ({arm.benchmark}): {arm.contradictions}. Another run of the same configuration "
        "and seed, with other scores, counts instead."
        for arm in arms
        if arm.contradictions
    ]
    texts += [
        f"{first.selector} at {100 * first.retention:g} %: {len(first.unhealthy)} of {first.seeds} runs not healthy "
        f"({'; '.join(dict.fromkeys(first.unhealthy))})."
        for first, *_ in group_by(arms, "identity").values()
        if first.unhealthy
    ]
    same: dict[tuple[str, str], list[str]] = {}  # (selector, why) -> "10 % (0.99)" of each retention
    for first, *_ in group_by(arms, "identity").values():
        kept = first.retention if math.isnan(first.kept_frac) else first.kept_frac
        chance = kept / (2 - kept)  # of a random selection
        if first.score not in ("entropy", "full") and first.overlap_entropy > SAME_TOKENS > chance:
            by_minmax = first.score == "soft_or" and first.config["selector.normalizer"] == "minmax"
            why = " One very large divergence can set the min-max scale; the scores then mostly rank by entropy."
            retentions = same.setdefault((first.selector, why if by_minmax else ""), [])
            retentions.append(f"{100 * first.retention:g} % ({first.overlap_entropy:.2f})")
    texts += [
        f"{selector} at {', '.join(retentions)} keeps almost the same tokens as ranking by entropy (Jaccard index, "
        f"mean over steps).{why}"
        for (selector, why), retentions in same.items()
    ]
    return texts


def csv_text(arms: list[ArmResult]) -> str:
    """All numbers of the arms, and every config key in which they differ.

    Accuracies and differences with their intervals are fractions, `kl_difference` is of the log KL; nan is empty.
    """
    import pandas as pd  # takes a second

    keys = differing_keys(arms, ignored=("pair.label", "data.label", "selector.label", "selector.retention"))
    rows = [_csv_row(arm) | {key: arm.config.get(key) for key in keys} for arm in arms]
    return pd.DataFrame([{key: _csv_cell(value) for key, value in row.items()} for row in rows]).to_csv(index=False)


def _csv_cell(value: Any) -> Any:
    """A quote before text that a spreadsheet would run as a formula: "=1+1" -> "'=1+1"."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _csv_row(arm: ArmResult) -> dict[str, Any]:
    row = {name: getattr(arm, name) for name in CSV_COLUMNS}
    row |= {name: "; ".join(row[name]) for name in ("sweeps", "hardware")}
    row |= {name: getattr(arm, name).mean for name in ACCURACIES}
    row |= {f"{name}_se": getattr(arm, name).se for name in ACCURACIES}
    row |= {"in_train_exact": arm.in_train[0], "in_train_13gram": arm.in_train[1]}
    for name, parts in DIFFERENCES.items():
        difference: Estimate | None = getattr(arm, name)
        row[name] = difference.mean if difference else math.nan
        row |= {f"{name}_{part}": getattr(difference, part) if difference else math.nan for part in parts}
    return row
