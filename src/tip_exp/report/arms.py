"""Records of runs -> a row an arm and benchmark: mean over seeds, difference to the full-token baseline, what differs.

An arm is all seeds of one config. Runs are averaged only if nothing but their seed differs; where two arms would look
alike in a table (same pair, data, selector, retention), `differs` says which keys set them apart.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (pandas types a column of a frame as a Series, a frame or anything)
from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tip_exp.config.parse import flatten
from tip_exp.records.reader import RunRecord
from tip_exp.report.significance import Arm, Difference, compare, holm

ACCURACIES = ("teacher", "start", "final", "greedy")
COSTS = ("kept_tokens", "loss_mib", "peak_gib", "process_gib", "wall_s")
NOT_DECIDING = ("name", "sweep", "logger")  # they say what a run is called, not what it does


@dataclass(frozen=True, slots=True)
class Measured:
    """A mean with its standard error, both fractions."""

    mean: float
    se: float

    def percent(self) -> str:
        return "-" if math.isnan(self.mean) else f"{100 * self.mean:.1f} ± {100 * self.se:.1f}"


def run_rows(record: RunRecord) -> list[dict[str, Any]]:
    """A row for each benchmark of a run: what it is (config.yaml), and what came out (result.json, if it is done)."""
    return [_run_row(record, benchmark) for benchmark in record.config["eval"]["benchmarks"]]


def runs_frame(records: list[RunRecord]) -> pd.DataFrame:
    return pd.DataFrame([row for record in records for row in run_rows(record)])


def summarize(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an arm and benchmark, in the order the runs come; see the head of this file and of statistics.py.

    A seed that was run twice (shared between sweeps, for example) counts once, a finished one before an unfinished one.
    `difference` is to the runs with selector.score=full that share everything but the selector; `p_holm` is corrected
    over all comparisons with that same baseline, on all its benchmarks.
    """
    first_done = runs.sort_values("state", kind="stable").drop_duplicates(["same", "benchmark", "seed"]).sort_index()
    rows = [_arm_row(group) for _, group in first_done.groupby(["same", "benchmark"], sort=False)]
    full = {(row["base"], row["benchmark"]): row for row in rows if row["score"] == "full" and row["arm"]}
    for row in rows:
        baseline = full.get((row["base"], row["benchmark"]))
        row["difference"] = _difference(row, baseline)
    _correct(rows)
    for row, differs in zip(rows, _differing(rows), strict=True):
        row["differs"] = differs
    return pd.DataFrame(rows)


def differing_keys(configs: list[dict[str, Any]]) -> list[str]:
    """Flat configs -> the keys whose values are not the same in all; a key that is absent counts as null."""
    keys = sorted(set().union(*configs)) if configs else []
    return [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]


def _run_row(record: RunRecord, benchmark: str) -> dict[str, Any]:
    config, result = record.config, record.result
    flat = {
        key: value
        for key, value in flatten({k: v for k, v in config.items() if k not in NOT_DECIDING}).items()
        if value is not None  # a key that a later version added is null where it changes nothing
    }
    seed = flat.pop("seed")
    row: dict[str, Any] = {
        "folder": record.folder,
        "sweep": config["sweep"],
        "pair": config["pair"]["label"],
        "data": config["data"]["label"],
        "benchmark": benchmark,
        "selector": config["selector"]["label"],
        "score": config["selector"]["score"],
        "retention": config["selector"]["retention"],
        "seed": seed,
        "same": json.dumps(flat, sort_keys=True),
        "base": json.dumps({k: v for k, v in flat.items() if not k.startswith("selector.")}, sort_keys=True),
        "config": flat,
        "state": "done" if result else "unfinished",
        "outcomes": record.outcomes.get(benchmark),
    }
    row |= dict.fromkeys([*ACCURACIES, *(f"{name}_se" for name in ACCURACIES), *COSTS, "no_tool_baseline"], math.nan)
    if result is None:
        return row | {"hardware": None, "git_revision": None}
    k = config["eval"]["samples"]
    for name in ("teacher", "start", "final"):
        accuracy = f"{benchmark}/mean@{k}" if k else f"{benchmark}/greedy"
        row[name] = result[name].get(accuracy, math.nan)
        row[f"{name}_se"] = result[name].get(f"{accuracy}_se", math.nan)
    row["greedy"] = result["final"].get(f"{benchmark}/greedy", math.nan)
    row["greedy_se"] = result["final"].get(f"{benchmark}/greedy_se", math.nan)
    row["no_tool_baseline"] = result["final"].get(f"{benchmark}/no_tool_baseline", math.nan)  # tool tasks only
    memory = result["memory"]
    row["kept_tokens"], row["wall_s"] = result["totals"]["kept_tokens"], result["totals"]["wall_s"]
    row["loss_mib"] = memory.get("memory/loss_extra_mib", math.nan)
    row["process_gib"] = memory.get("memory/process_peak_gib", math.nan)
    row["peak_gib"] = memory.get("memory/learner_peak_gib", row["process_gib"])
    return row | {"hardware": result["hardware"], "git_revision": result["git_revision"]}


def _arm_row(group: pd.DataFrame) -> dict[str, Any]:
    done, first = group[group["state"] == "done"], group.iloc[0]
    row: dict[str, Any] = {
        key: first[key]
        for key in ("pair", "data", "benchmark", "selector", "score", "retention", "same", "base", "config")
    }
    row |= {"seeds": len(done), "runs": len(group), "seed_list": sorted(done["seed"].tolist())}
    row["folders"] = list(group["folder"])
    row["sweeps"] = sorted({sweep for sweep in group["sweep"] if isinstance(sweep, str)})
    row["hardware"] = sorted(set(done["hardware"]))
    for name in ACCURACIES:
        row[name] = _over_seeds(done, name)
    for name in (*COSTS, "no_tool_baseline"):
        row[name] = float(done[name].mean()) if len(done) else math.nan
    unfinished = len(group) - len(done)
    row["state"] = "done" if not unfinished else f"{unfinished} of {len(group)} unfinished"
    row["arm"] = _arm(done)
    return row


def _over_seeds(done: pd.DataFrame, name: str) -> Measured:
    """With several seeds the error is over seeds; one seed has the one over problems, which knows of no other seed."""
    if not len(done):
        return Measured(math.nan, math.nan)
    if len(done) == 1:
        return Measured(done[name].iloc[0], done[f"{name}_se"].iloc[0])
    return Measured(done[name].mean(), done[name].std(ddof=1) / math.sqrt(len(done)))


def _arm(done: pd.DataFrame) -> Arm | None:
    """Accuracy by seed and problem, or None where a run left no outcomes or was asked other problems."""
    found = [outcome for outcome in done["outcomes"] if isinstance(outcome, dict)]
    if not found or len(found) < len(done) or any(one["right"].keys() != found[0]["right"].keys() for one in found):
        return None
    problems = tuple(found[0]["right"])
    scores = [[one["right"][problem] / one["samples"] for problem in problems] for one in found]
    return Arm(problems, np.array(scores, dtype=float), tuple(done["seed"]))


def _difference(row: dict[str, Any], baseline: dict[str, Any] | None) -> Difference | None:
    ours = row["arm"]
    if baseline is None or ours is None or row is baseline or row["score"] == "full":
        return None
    if set(ours.problems) != set(baseline["arm"].problems):
        return None
    return compare(ours, baseline["arm"])


def _correct(rows: list[dict[str, Any]]) -> None:
    """`p_holm` over the family of one baseline."""
    for base in {row["base"] for row in rows}:
        family = [row for row in rows if row["base"] == base]
        corrected = holm([row["difference"].p if row["difference"] else math.nan for row in family])
        for row, p in zip(family, corrected, strict=True):
            row["p_holm"] = p


def _differing(rows: list[dict[str, Any]]) -> list[str]:
    """ "learner.num_steps=20" for arms that look like another one of the same table, else ""."""
    looks = [tuple(row[key] for key in ("pair", "data", "benchmark", "selector", "retention")) for row in rows]
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for look, row in zip(looks, rows, strict=True):
        alike.setdefault(look, []).append(row["config"])
    keys = {look: differing_keys(configs) for look, configs in alike.items()}
    return [
        ", ".join(f"{key}={row['config'].get(key)}" for key in keys[look])
        for look, row in zip(looks, rows, strict=True)
    ]
