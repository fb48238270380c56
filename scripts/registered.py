"""The registered test (results/preregistration.md): each arm's best setting by the search, and the test's differences.

    python -m scripts.registered outputs/sweeps/registered_search      # settings of registered.yaml
    python -m scripts.registered outputs/sweeps/registered            # differences to F, verdicts
    python -m scripts.registered results/registered_second.runs.gz --hypotheses R

Prints Markdown tables. A folder whose arms have one setting each is a test, another is a search.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tip_exp.records import metrics
from tip_exp.records.reader import RunRecord
from tip_exp.report.arms import ArmResult, summarize
from tip_exp.report.columns import p_value, percent, points, ratio
from tip_exp.report.run_files import read_records
from tip_exp.report.significance import ArmScores, Estimate, compare, estimate, holm, scores_of
from tip_exp.report.tables import Table, markdown
from tip_exp.utils.errors import DataError, exit_on_error, quiet_when_reader_closes

ARMS = {  # selector.score, selector.weight, learner.divergence -> arm of the registration
    ("full", "none", "reverse_kl"): "F",
    ("full", "sqrt", "reverse_kl"): "W",
    ("grad_norm", "inverse_gradient", "reverse_kl"): "R",
    ("grad_norm", "none", "reverse_kl"): "M",
    ("full", "none", "jsd"): "J",
}
SETTING = ("learner.lr", "learner.eps", "learner.betas", "learner.grad_clip")
HYPOTHESES = ("W", "R")
ACCURACY_MARGIN = 0.02  # a confirmed arm loses less of mean@4


@quiet_when_reader_closes
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="+", type=Path, metavar="FOLDER", help="runs, or an archive of runs")
    parser.add_argument(
        "--hypotheses", nargs="+", choices=HYPOTHESES, default=HYPOTHESES, help="arms with a registered hypothesis"
    )
    given = parser.parse_args()
    with exit_on_error(DataError):
        print(markdown(result_table(given.roots, given.hypotheses)))


def result_table(roots: list[Path], hypotheses: Sequence[str] = HYPOTHESES) -> Table:
    """The search, or the test. Raises DataError if there is no run of F, or a run of none of the arms."""
    arms: dict[str, list[ArmResult]] = {}
    runs = {run.folder: run for run in read_records(roots)[0]}
    for arm in summarize(list(runs.values())):
        if arm.seeds:
            arms.setdefault(name_of(arm), []).append(arm)
    if "F" not in arms:
        raise DataError("no finished run of F (selector=full) in these folders")
    is_test = all(len(settings) == 1 for settings in arms.values())
    if is_test:
        return differences_table({name: settings[0] for name, settings in arms.items()}, runs, hypotheses)
    return search_table(arms)


def name_of(arm: ArmResult) -> str:
    """F, W, R, M or J. Raises DataError for another."""
    rule = arm.score, arm.config["selector.weight"], arm.config["learner.divergence"]
    if rule not in ARMS:
        raise DataError(f"{', '.join(rule)} is no arm of the registered test (results/preregistration.md)")
    return ARMS[rule]


def search_table(arms: dict[str, list[ArmResult]]) -> Table:
    """A row per arm and setting, the best setting of an arm first: by the mean log KL of a response over all seeds."""
    rows: list[list[str]] = []
    for name in sorted(arms):
        for rank, arm in enumerate(sorted(arms[name], key=_log_kl)):
            mark = "best" if rank == 0 else ""
            values = [str(arm.config[key]) for key in SETTING]
            rows.append([name, *values, str(arm.seeds), f"{_log_kl(arm):.3f}", percent(arm.final), mark])
    return Table("", ["arm", *SETTING, "seeds", "mean log KL", "mean@4", ""], rows)


def differences_table(arms: dict[str, ArmResult], runs: dict[str, RunRecord], hypotheses: Sequence[str]) -> Table:
    """A row per arm with its differences to F, and for `hypotheses` p and the verdict by the registered rule.

    `runs` by folder have the greedy responses.
    """
    full = arms["F"]
    differences = {name: compare(arm.kl_scores, full.kl_scores) for name, arm in arms.items() if name != "F"}
    p_values = [difference.p if (difference := differences.get(name)) else np.nan for name in hypotheses]
    adjusted = dict(zip(hypotheses, holm(p_values), strict=True))
    greedy = {name: _greedy(arm, runs) for name, arm in arms.items()}
    rows: list[list[str]] = []
    for name, arm in sorted(arms.items(), key=lambda item: _log_kl(item[1])):
        difference, change = differences.get(name), compare(arm.scores, full.scores)
        verdict = verdict_of(difference, change) if name in hypotheses and difference and change else ""
        log_kl = estimate(arm.kl_scores.scores) if arm.kl_scores else Estimate(np.nan, np.nan)
        cells = [ratio(difference), p_value(adjusted[name]) if name in adjusted else "", points(change)]
        cells += [points(compare(greedy[name], greedy["F"])), verdict]
        nats = f"{arm.seq_kl:.2f}" + ("" if arm is full else f", {_nats(arm, full, runs)}")
        settings = " ".join(arm.values_of(list(SETTING[:2])))
        rows.append(
            [name, settings, str(arm.seeds), f"{log_kl.mean:.3f} ± {log_kl.se:.3f}", nats, percent(arm.final), *cells]
        )
    mean = f"mean@{full.config['eval.samples']}"
    headings = ["arm", "setting", "seeds", "mean log KL", "mean KL, nats, against F", mean]
    headings += ["KL against F [95 %]", "p (Holm)"]
    return Table("", [*headings, f"{mean} against F", "greedy against F", "hypothesis"], rows)


def verdict_of(log_kl: Estimate, accuracy: Estimate) -> str:
    """The verdict on an arm, by its differences to F in log KL and in accuracy (a fraction)."""
    if log_kl.high < 0 and accuracy.low > -ACCURACY_MARGIN:
        return "confirmed"
    return "contradicted" if log_kl.low > 0 else "not resolved"


def _greedy(arm: ArmResult, runs: dict[str, RunRecord]) -> ArmScores | None:
    done = [run for folder in arm.folders if (run := runs[folder]).is_done]
    return scores_of(done, arm.benchmark, metrics.GREEDY)


def _nats(arm: ArmResult, full: ArmResult, runs: dict[str, RunRecord]) -> str:
    """The difference of the mean KL of a response, with its interval over paired seeds of the same problems."""
    mine, of_full = (
        {run.config["seed"]: run.result["final"][f"{each.benchmark}/{metrics.SEQ_KL}"]
         for folder in each.folders if (run := runs[folder]).result is not None}
        for each in (arm, full)
    )  # fmt: skip
    changes = np.array([mine[seed] - of_full[seed] for seed in sorted(mine.keys() & of_full.keys())])
    if len(changes) < 2:
        return "-"
    change = Estimate(float(changes.mean()), float(changes.std(ddof=1)) / len(changes) ** 0.5, len(changes) - 1)
    return f"{change.mean:+.2f} [{change.low:.2f}, {change.high:.2f}]"


def _log_kl(arm: ArmResult) -> float:
    return float(arm.kl_scores.scores.mean()) if arm.kl_scores else np.nan


if __name__ == "__main__":
    main()
