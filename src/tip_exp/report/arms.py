"""Run records -> one `ArmResult` per arm and benchmark: accuracy over seeds, cost, difference to the full-token arm.

An arm is all seeds of one config: runs are averaged only if they differ in nothing but the seed. Where arms look alike
in a table (same pair, data, selector and retention), `differs` names the keys that tell them apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from tip_exp.config.parse import flatten
from tip_exp.records import metrics
from tip_exp.records.reader import RunRecord, read_runs
from tip_exp.report.significance import ArmScores, Difference, compare, holm
from tip_exp.utils.errors import DataError

IGNORED_KEYS = ("name", "sweep", "logger", "seed")  # runs of one arm may differ in these


@dataclass(frozen=True, slots=True)
class Accuracy:
    """An accuracy with its standard error, both fractions; nan if not measured."""

    mean: float
    se: float

    def percent(self) -> str:
        return "-" if math.isnan(self.mean) else f"{100 * self.mean:.1f} ± {100 * self.se:.1f}"


@dataclass(slots=True)
class ArmResult:
    """What the finished seeds of one arm reached on one benchmark. `runs` and `folders` count unfinished seeds too."""

    pair: str
    data: str
    benchmark: str
    selector: str
    score: str
    retention: float
    config: dict[str, Any] = field(repr=False)  # flat, without IGNORED_KEYS
    identity: str = field(repr=False)  # `config` as text
    setting: str = field(repr=False)  # `config` without the selector, as text
    seeds: int
    runs: int
    folders: list[str]
    sweeps: list[str]
    hardware: list[str]
    teacher: Accuracy
    start: Accuracy
    final: Accuracy
    greedy: Accuracy
    kept_tokens: float
    loss_mib: float
    peak_gib: float
    process_gib: float
    wall_s: float
    no_tool_baseline: float
    scores: ArmScores | None = field(repr=False)  # None if a run has other problems than the others
    difference: Difference | None = None  # to the full-token arm of the same setting
    p_holm: float = math.nan
    differs: str = ""

    @property
    def state(self) -> str:
        return "done" if self.seeds == self.runs else f"{self.runs - self.seeds} of {self.runs} unfinished"

    def values_of(self, keys: list[str]) -> list[str]:
        """["learner.lr=0.001", "learner.num_steps=40"], each on one line"""
        return [f"{key}={self.config.get(key)}".replace("\n", "\\n") for key in keys]


def read_records(roots: list[Path]) -> list[RunRecord]:
    """The records of all runs below the roots. Raises DataError if a root is no folder or no run is found."""
    for root in roots:
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; give folders that hold runs, such as outputs/sweeps/demo")
    records = read_runs(roots)
    if not records:
        raise DataError(f"no run (a folder with config.yaml) below {', '.join(map(str, roots))}")
    return records


def summarize(records: list[RunRecord]) -> list[ArmResult]:
    """One result per arm and benchmark, in the order of the records.

    A seed that was run twice (in two sweeps, for example) counts once; a finished run is preferred. The baseline of a
    `difference` is the arm with selector.score=full that shares everything but the selector. `p_holm` is corrected over
    all comparisons of one setting, on all its benchmarks.
    """
    by_seed: dict[tuple[str, str, int], RunRecord] = {}
    for record in records:
        identity = json.dumps(_arm_config(record.config), sort_keys=True)
        for benchmark in record.config["eval"]["benchmarks"]:
            key = identity, benchmark, record.config["seed"]
            if key not in by_seed or (record.is_done and not by_seed[key].is_done):
                by_seed.pop(key, None)
                by_seed[key] = record
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for (identity, benchmark, _), record in by_seed.items():
        groups.setdefault((identity, benchmark), []).append(record)
    arms = [_arm(group, identity, benchmark) for (identity, benchmark), group in groups.items()]
    baselines = {(arm.setting, arm.benchmark): arm.scores for arm in arms if arm.score == "full" and arm.scores}
    for arm in arms:
        baseline = baselines.get((arm.setting, arm.benchmark))
        if arm.score != "full" and arm.scores and baseline:
            arm.difference = compare(arm.scores, baseline)
    for family in group_by(arms, "setting").values():
        p_values = holm([arm.difference.p if arm.difference else math.nan for arm in family])
        for arm, p_holm in zip(family, p_values, strict=True):
            arm.p_holm = p_holm
    for alike in group_by(arms, "pair", "data", "benchmark", "selector", "retention").values():
        keys = differing_keys(alike)
        for arm in alike:
            arm.differs = ", ".join(arm.values_of(keys))
    return arms


def group_by(arms: Iterable[ArmResult], *fields: str) -> dict[Any, list[ArmResult]]:
    """Arms by the value of a field (a tuple of values for several), in the order of first appearance."""
    groups: dict[Any, list[ArmResult]] = {}
    for arm in arms:
        groups.setdefault(attrgetter(*fields)(arm), []).append(arm)
    return groups


def differing_keys(arms: list[ArmResult], *, ignored: tuple[str, ...] = ()) -> list[str]:
    """The config keys whose values are not the same in all arms; an absent key counts as null.

    Keys that start with one of `ignored` are left out.
    """
    keys = sorted({key for arm in arms for key in arm.config if not key.startswith(ignored)})
    return [key for key in keys if len({json.dumps(arm.config.get(key)) for arm in arms}) > 1]


def _arm_config(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config, flat, without what the runs of an arm may differ in."""
    flat = flatten({key: value for key, value in config.items() if key not in IGNORED_KEYS})
    if flat.get("pair.student.per_seed"):
        del flat["pair.student.path"]
    return flat


def _arm(records: list[RunRecord], identity: str, benchmark: str) -> ArmResult:
    config = json.loads(identity)
    results = [record.result for record in records if record.result is not None]
    main = metrics.main_accuracy(benchmark, config["eval.samples"])
    return ArmResult(
        pair=config["pair.label"],
        data=config["data.label"],
        benchmark=benchmark,
        selector=config["selector.label"],
        score=config["selector.score"],
        retention=config["selector.retention"],
        config=config,
        identity=identity,
        setting=json.dumps({key: value for key, value in config.items() if not key.startswith("selector.")}),
        seeds=len(results),
        runs=len(records),
        folders=[record.folder for record in records],
        sweeps=sorted({record.config["sweep"] for record in records if record.config["sweep"]}),
        hardware=sorted({result["hardware"] for result in results}),
        teacher=_accuracy(results, "teacher", main),
        start=_accuracy(results, "start", main),
        final=_accuracy(results, "final", main),
        greedy=_accuracy(results, "final", f"{benchmark}/{metrics.GREEDY}"),
        kept_tokens=_mean(results, "totals", "kept_tokens"),
        loss_mib=_mean(results, "memory", metrics.extra_mib("loss")),
        peak_gib=_mean(results, "memory", metrics.peak_gib("learner"), metrics.PROCESS_PEAK_GIB),
        process_gib=_mean(results, "memory", metrics.PROCESS_PEAK_GIB),
        wall_s=_mean(results, "totals", "wall_s"),
        no_tool_baseline=_mean(results, "final", f"{benchmark}/{metrics.NO_TOOL_BASELINE}"),
        scores=_scores([record for record in records if record.is_done], benchmark),
    )


def _accuracy(results: list[dict[str, Any]], part: str, name: str) -> Accuracy:
    """Mean over seeds with the standard error over seeds; for one seed, the standard error over problems."""
    if len(results) == 1:
        standard_error = results[0][part].get(metrics.standard_error_of(name), math.nan)
    else:
        values = [result[part].get(name, math.nan) for result in results]
        standard_error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if values else math.nan
    return Accuracy(_mean(results, part, name), standard_error)


def _mean(results: list[dict[str, Any]], part: str, *names: str) -> float:
    """Mean over the runs of the first of these values that this part of a run's result has; nan if none has any."""
    values = [next((result[part][name] for name in names if name in result[part]), math.nan) for result in results]
    measured = [value for value in values if not math.isnan(value)]
    return float(np.mean(measured)) if measured else math.nan


def _scores(done: list[RunRecord], benchmark: str) -> ArmScores | None:
    """Mean score by seed and problem; None without a finished run, or if the runs were given different problems."""
    outcomes = [record.outcomes[benchmark] for record in done if benchmark in record.outcomes]
    if not outcomes or len(outcomes) < len(done):
        return None
    problems = tuple(outcomes[0]["right"])
    if any(outcome["right"].keys() != outcomes[0]["right"].keys() for outcome in outcomes):
        return None
    scores = [[outcome["right"][problem] / outcome["samples"] for problem in problems] for outcome in outcomes]
    return ArmScores(problems, np.array(scores, dtype=float), tuple(record.config["seed"] for record in done))
