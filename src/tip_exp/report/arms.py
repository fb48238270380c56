"""Run records -> one `ArmResult` per arm and benchmark: accuracy over seeds, cost, difference to the full-token arm.

An arm is all seeds of one config: runs are averaged only if they differ in nothing but the seed. Where arms look alike
in a table (same pair, data, selector and retention), `differs` names the keys that tell them apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tip_exp.config.parse import flatten
from tip_exp.records import metrics
from tip_exp.records.reader import RunRecord, read_runs
from tip_exp.report.significance import ArmScores, Difference, compare, holm
from tip_exp.utils.errors import DataError

IGNORED_KEYS = ("name", "sweep", "logger")  # they do not change what a run computes


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
    config: dict[str, Any] = field(repr=False)  # flat, without seed and IGNORED_KEYS
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
    by_seed: dict[tuple[str, str, int], tuple[RunRecord, dict[str, Any]]] = {}
    for record in records:
        flat = _computing_keys(record.config)
        for benchmark in record.config["eval"]["benchmarks"]:
            key = (_text(flat), benchmark, record.config["seed"])
            if key not in by_seed or (record.is_done and not by_seed[key][0].is_done):
                by_seed.pop(key, None)
                by_seed[key] = record, flat
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    configs: dict[str, dict[str, Any]] = {}
    for (identity, benchmark, _), (record, flat) in by_seed.items():
        groups.setdefault((identity, benchmark), []).append(record)
        configs[identity] = flat
    arms = [_arm(group, identity, configs[identity], name) for (identity, name), group in groups.items()]
    baselines = {(arm.setting, arm.benchmark): arm for arm in arms if arm.score == "full" and arm.scores}
    for arm in arms:
        arm.difference = _difference(arm, baselines.get((arm.setting, arm.benchmark)))
    for family in group_by(arms, "setting").values():
        p_values = holm([arm.difference.p if arm.difference else math.nan for arm in family])
        for arm, p_holm in zip(family, p_values, strict=True):
            arm.p_holm = p_holm
    for alike in group_by(arms, "pair", "data", "benchmark", "selector", "retention").values():
        keys = differing_keys([arm.config for arm in alike])
        for arm in alike:
            arm.differs = ", ".join(f"{key}={arm.config.get(key)}" for key in keys)
    return arms


def group_by(arms: Iterable[ArmResult], *fields: str) -> dict[Any, list[ArmResult]]:
    """Arms by the value of a field (a tuple of values for several), in the order of first appearance."""
    groups: dict[Any, list[ArmResult]] = {}
    for arm in arms:
        values = tuple(getattr(arm, name) for name in fields)
        groups.setdefault(values if len(fields) > 1 else values[0], []).append(arm)
    return groups


def differing_keys(configs: list[dict[str, Any]]) -> list[str]:
    """The keys of flat configs whose values are not the same in all; an absent key counts as null."""
    keys = sorted(set().union(*configs)) if configs else []
    return [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]


def _computing_keys(config: dict[str, Any]) -> dict[str, Any]:
    return flatten({key: value for key, value in config.items() if key not in (*IGNORED_KEYS, "seed")})


def _text(flat: dict[str, Any]) -> str:
    return json.dumps(flat, sort_keys=True)


def _arm(records: list[RunRecord], identity: str, flat: dict[str, Any], benchmark: str) -> ArmResult:
    config = records[0].config
    done = [record for record in records if record.is_done]
    results = [record.result for record in records if record.result is not None]
    main = metrics.main_accuracy(benchmark, config["eval"]["samples"])
    baseline = f"{benchmark}/{metrics.NO_TOOL_BASELINE}"

    def memory(*names: str) -> float:
        """Mean over the runs of the first of these metrics that a run has."""
        return _mean([next((m[name] for name in names if name in m), math.nan) for m in (r["memory"] for r in results)])

    return ArmResult(
        pair=config["pair"]["label"],
        data=config["data"]["label"],
        benchmark=benchmark,
        selector=config["selector"]["label"],
        score=config["selector"]["score"],
        retention=config["selector"]["retention"],
        config=flat,
        identity=identity,
        setting=_text({key: value for key, value in flat.items() if not key.startswith("selector.")}),
        seeds=len(done),
        runs=len(records),
        folders=[record.folder for record in records],
        sweeps=sorted({record.config["sweep"] for record in records if record.config["sweep"]}),
        hardware=sorted({result["hardware"] for result in results}),
        teacher=_accuracy([result["teacher"] for result in results], main),
        start=_accuracy([result["start"] for result in results], main),
        final=_accuracy([result["final"] for result in results], main),
        greedy=_accuracy([result["final"] for result in results], f"{benchmark}/{metrics.GREEDY}"),
        kept_tokens=_mean([result["totals"]["kept_tokens"] for result in results]),
        loss_mib=memory(metrics.extra_mib("loss")),
        peak_gib=memory(metrics.peak_gib("learner"), metrics.PROCESS_PEAK_GIB),
        process_gib=memory(metrics.PROCESS_PEAK_GIB),
        wall_s=_mean([result["totals"]["wall_s"] for result in results]),
        no_tool_baseline=_mean([result["final"].get(baseline, math.nan) for result in results]),
        scores=_scores(done, benchmark),
    )


def _accuracy(evaluations: list[dict[str, float]], name: str) -> Accuracy:
    """Mean over seeds with the standard error over seeds; for one seed, the standard error over problems."""
    values = [evaluation.get(name, math.nan) for evaluation in evaluations]
    if len(values) == 1:
        return Accuracy(values[0], evaluations[0].get(metrics.standard_error_of(name), math.nan))
    return Accuracy(_mean(values), float(np.std(values, ddof=1)) / math.sqrt(len(values)) if values else math.nan)


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that were measured; nan if none was."""
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


def _difference(arm: ArmResult, baseline: ArmResult | None) -> Difference | None:
    if arm.score == "full" or arm.scores is None or baseline is None or baseline.scores is None:
        return None
    if set(arm.scores.problems) != set(baseline.scores.problems):
        return None
    return compare(arm.scores, baseline.scores)
