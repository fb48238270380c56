"""The rollouts of the token viewer: each arm's own, and those on which the selectors are compared."""

from __future__ import annotations

from typing import Any

from tip_exp.records.validate import is_finite
from tip_exp.report.overlaps import Overlaps
from tip_exp.report.run_files import RunFiles
from tip_exp.selector.scores import STATISTICS

SHOWN_SAMPLES = 2  # rollouts of an arm from its first evaluation, and as many from its last
MAX_REFERENCE = 64  # rollouts on which the selectors are compared


def reference_rollouts(runs: list[RunFiles]) -> list[dict[str, Any]]:
    """Rollouts of the first evaluation with entropy and divergence, of full-token runs if there are any."""
    rows: list[dict[str, Any]] = []
    for run in sorted(runs, key=lambda run: run.config["selector"]["score"] != "full"):
        complete = [row for row in run.samples if _is_complete(row)]
        rows += [
            row | {"run": f"compared selectors: {run.arm}, seed {run.config['seed']}"}
            for row in complete
            if row["step"] == complete[0]["step"]
        ]
    return rows[:MAX_REFERENCE]


def viewer_rollouts(runs: list[RunFiles], tokens: Overlaps) -> list[dict[str, Any]]:
    """The reference rollouts with what each arm keeps of them, then some rollouts of one seed of each arm.

    Those are from its first and its last evaluation. The seed is the lowest one whose samples have the most likely
    tokens, else the lowest. `reference` is the number of a reference rollout in the plane of entropy and divergence.
    """
    rollouts: list[dict[str, Any]] = []
    start = 0
    for number, row in enumerate(reference_rollouts(runs)):
        stop = start + len(row["tokens"])
        kept_by = {arm: kept[start:stop] for arm, kept in tokens.kept.items()}
        rollouts.append(row | {"reference": number, "kept_by": kept_by})
        start = stop
    for arm in dict.fromkeys(run.arm for run in runs):
        run = min(
            (run for run in runs if run.arm == arm),
            key=lambda run: ("student_top" not in (run.samples or [{}])[0], run.config["seed"]),
        )
        name = f"{arm}, seed {run.config['seed']}"
        for step in sorted({row["step"] for row in (*run.samples[:1], *run.samples[-1:])}):
            rollouts += [row | {"run": name} for row in run.samples if row["step"] == step][:SHOWN_SAMPLES]
    thresholds = runs[0].config["quadrants"] if runs else {}
    return [row | {"thresholds": thresholds} for row in rollouts]


def _is_complete(row: dict[str, Any]) -> bool:
    """Whether it has what the plane draws, and no statistic that is not finite."""
    present = {name for name in STATISTICS if name in row}
    return {"entropy", "reverse_kl"} <= present and all(is_finite(value) for name in present for value in row[name])
