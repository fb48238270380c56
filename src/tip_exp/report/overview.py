"""Arm results as a table of text, one row per arm and benchmark, and as CSV."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tip_exp.report.arms import ArmResult, differing_keys, group_by
from tip_exp.report.significance import Estimate
from tip_exp.report.tables import Table

MARGIN = 2.0  # points of accuracy: a smaller difference to full does not matter
SAME_TOKENS = 0.9  # Jaccard index with top entropy from which a note says so
NOTES = (
    "retention: the setting; kept: tokens trained on over all response tokens, in % (each response's budget is rounded "
    "down); Q3 kept: the same among tokens of low entropy and high divergence\n"
    "final: mean@k of the sampled responses in %, greedy: accuracy of the greedy response in %, each ± its standard "
    "error; errors cover: what this error and the intervals include. With one seed they hold for these trained "
    "students only, and there is no p\n"
    "gap closed: (final - step 0) / (teacher - step 0)\n"
    "vs full: difference to training on every token, on the same problems, in points [95 % interval]; p (Holm): "
    "two-sided, corrected over all comparisons of one setting (variances of problems and seeds, Student's t; simulated "
    "coverage: results/coverage.md)\n"
    f"within ± {MARGIN:g}: is the difference within {MARGIN:g} points at 95 %, by two one-sided tests; in brackets the "
    "smallest margin for which it is. no: the 95 % interval lies outside; not shown: more seeds are needed to tell\n"
    "KL/response: KL(student || teacher) in nats, summed over a sampled response to a held-out problem; KL vs full: "
    "ratio of the geometric means [95 % interval], with its own p\n"
    "loss MiB: peak allocation of the masked loss"
)
ACCURACIES = ("teacher", "start", "final", "greedy")
CSV_COLUMNS = (
    "pair", "data", "benchmark", "selector", "retention", "seeds", "runs", "sweeps", "hardware", *ACCURACIES,
    "strict", "gap_closed", "seq_kl", "kept_tokens", "kept_frac", "q3_kept_frac", "overlap_entropy", "loss_mib",
    "peak_gib", "process_gib", "wall_s", "no_tool_baseline", "state", "p_holm", "kl_p_holm", "differs",
)  # fmt: skip
DIFFERENCES = {"difference": ("low", "high", "p", "margin", "over_seeds"), "kl_difference": ("low", "high", "p")}


def percent(accuracy: Estimate) -> str:
    """ "81.0 ± 1.5", without the error if it was not measured."""
    error = "" if math.isnan(accuracy.se) else f" ± {100 * accuracy.se:.1f}"
    return "-" if math.isnan(accuracy.mean) else f"{100 * accuracy.mean:.1f}{error}"


def points(difference: Estimate | None) -> str:
    """ "+1.2 [-0.5, 2.9]" """
    if difference is None:
        return "-"
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:.1f}, {100 * difference.high:.1f}]"


def ratio(log_difference: Estimate | None) -> str:
    """ "× 0.83 [0.78, 0.88]" """
    if log_difference is None:
        return "-"
    low, high = math.exp(log_difference.low), math.exp(log_difference.high)
    return f"× {math.exp(log_difference.mean):.2f} [{low:.2f}, {high:.2f}]"


def equivalence(difference: Estimate | None) -> str:
    """ "yes (± 1.4)", "not shown (± 3.9)", "no (± 30.1)" if it is larger than MARGIN at 95 %; "-" with one seed."""
    if difference is None or math.isnan(difference.margin):
        return "-"
    margin = 100 * difference.margin
    is_larger = 100 * (abs(difference.mean) - difference.half_width()) > MARGIN
    return f"{'yes' if margin <= MARGIN else 'no' if is_larger else 'not shown'} (± {margin:.1f})"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else _number("{:.3f}", p)


def errors_cover(arm: ArmResult) -> str:
    covered = _covered(arm.seeds > 1)
    if arm.difference is None or _covered(arm.difference.over_seeds) == covered:
        return covered if arm.seeds else "-"
    return f"{covered}; vs full: {_covered(arm.difference.over_seeds)}"


def _covered(over_seeds: bool) -> str:
    return "problems and seeds" if over_seeds else "problems, not seeds"


def _number(form: str, value: float) -> str:
    return "-" if math.isnan(value) else form.format(value)


# heading -> text of an arm's cell
COLUMNS: dict[str, Callable[[ArmResult], str]] = {
    "pair": lambda arm: arm.pair,
    "benchmark": lambda arm: arm.benchmark,
    "selector": lambda arm: arm.selector,
    "retention": lambda arm: f"{100 * arm.retention:g} %",
    "kept": lambda arm: _number("{:.1f} %", 100 * arm.kept_frac),
    "Q3 kept": lambda arm: _number("{:.1f} %", 100 * arm.q3_kept_frac),
    "seeds": lambda arm: str(arm.seeds),
    "no-tool baseline": lambda arm: _number("{:.1f}", 100 * arm.no_tool_baseline),
    "teacher ± se": lambda arm: percent(arm.teacher),
    "step 0 ± se": lambda arm: percent(arm.start),
    "final ± se": lambda arm: percent(arm.final),
    "greedy ± se": lambda arm: percent(arm.greedy),
    "gap closed": lambda arm: _number("{:z.0f} %", 100 * arm.gap_closed),
    "vs full [95 %]": lambda arm: points(arm.difference),
    "errors cover": errors_cover,
    "p (Holm)": lambda arm: p_value(arm.p_holm),
    f"within ± {MARGIN:g}": lambda arm: equivalence(arm.difference),
    "KL/response": lambda arm: _number("{:.3g}", arm.seq_kl),
    "KL vs full [95 %]": lambda arm: ratio(arm.kl_difference),
    "KL p (Holm)": lambda arm: p_value(arm.kl_p_holm),
    "loss MiB": lambda arm: _number("{:.1f}", arm.loss_mib),
    "state": lambda arm: arm.state,
    "differs in": lambda arm: arm.differs,
}
OF_ONE_MODEL = ("teacher ± se", "step 0 ± se")


def overview(arms: list[ArmResult]) -> Table:
    """One row per arm and benchmark; columns that say nothing are left out, and what all rows share is a note."""
    shared = [name for name in OF_ONE_MODEL if len(arms) > 1 and len({COLUMNS[name](arm) for arm in arms}) == 1]
    has_kl = any(not math.isnan(arm.seq_kl) for arm in arms)
    is_shown = {
        "pair": len({arm.pair for arm in arms}) > 1,
        "benchmark": len({arm.benchmark for arm in arms}) > 1,
        "Q3 kept": any(not math.isnan(arm.q3_kept_frac) for arm in arms),
        "no-tool baseline": any(not math.isnan(arm.no_tool_baseline) for arm in arms),
        "KL/response": has_kl, "KL vs full [95 %]": has_kl, "KL p (Holm)": has_kl,
        "state": any(arm.seeds < arm.runs for arm in arms),
        "differs in": any(arm.differs for arm in arms),
    } | dict.fromkeys(shared, False)  # fmt: skip
    headings = [heading for heading in COLUMNS if is_shown.get(heading, True)]
    same = ", ".join(f"{name.removesuffix(' ± se')} {COLUMNS[name](arms[0])}" for name in shared)
    notes = [f"All rows: {same} (% ± standard error over problems)."] if shared else []
    rows = [[COLUMNS[heading](arm) for heading in headings] for arm in arms]
    return Table("", headings, rows, notes=notes + warnings(arms))


def warnings(arms: list[ArmResult]) -> list[str]:
    """What a reader must know: test problems that were trained on, unhealthy runs, selectors that equal top entropy."""
    texts: list[str] = []
    for benchmark, of_benchmark in group_by(arms, "benchmark").items():
        whole, ngram = (max(arm.in_train[i] for arm in of_benchmark) for i in (0, 1))
        if whole or ngram:
            texts.append(
                f"{benchmark}: the training set holds {whole} of its test problems whole, and {ngram} more share 13 "
                "words in a row with a training problem. Accuracies on them are not held out."
            )
    texts += [
        f"{first.selector} at {100 * first.retention:g} %: {len(first.unhealthy)} of {first.seeds} runs not healthy "
        f"({'; '.join(dict.fromkeys(first.unhealthy))})."
        for first, *_ in group_by(arms, "identity").values()
        if first.unhealthy
    ]
    same: dict[tuple[str, str], list[str]] = {}  # (selector, why) -> "10 % (0.99)" of each retention
    for first, *_ in group_by(arms, "identity").values():
        chance = first.retention / (2 - first.retention)  # of a random selection
        if first.score not in ("entropy", "full") and first.overlap_entropy > SAME_TOKENS > chance:
            by_minmax = first.score == "soft_or" and first.config["selector.normalizer"] == "minmax"
            why = " Min-max stretches to the largest divergence, so that Eq. 7 ranks most tokens by entropy."
            retentions = same.setdefault((first.selector, why if by_minmax else ""), [])
            retentions.append(f"{100 * first.retention:g} % ({first.overlap_entropy:.2f})")
    texts += [
        f"{selector} at {', '.join(retentions)} keeps nearly the tokens of top entropy (Jaccard index, mean over "
        f"steps).{why}"
        for (selector, why), retentions in same.items()
    ]
    return texts


def csv_text(arms: list[ArmResult]) -> str:
    """All numbers of the arms, and every config key in which they differ.

    Accuracies and differences with their intervals are fractions, `kl_difference` is of the log KL; nan is empty.
    """
    import pandas as pd  # takes a second

    keys = differing_keys(arms, ignored=("pair.label", "data.label", "selector.label", "selector.retention"))
    return pd.DataFrame([_csv_row(arm) | {key: arm.config.get(key) for key in keys} for arm in arms]).to_csv(
        index=False
    )


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
