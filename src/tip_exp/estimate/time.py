"""How long a run takes, before it starts.

Measured if a run of the same shape (same config but for seed, selector and name) is finished; else scaled by
floating-point operations from finished runs of the same pair; else a lower bound for one H200.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tip_exp.config.parse import deciding_values, flatten
from tip_exp.config.schema import RunConfig
from tip_exp.estimate.memory import memory_gib
from tip_exp.estimate.shapes import shape_of
from tip_exp.records.reader import RunRecord, read_runs

H200_FLOPS = 0.4 * 989e12  # per second: 40 % of the dense bfloat16 peak
MEAN_LENGTH = 0.5  # mean response length as a share of the maximum


@dataclass(frozen=True, slots=True)
class Forecast:
    """GiB of the learner's process, seconds of the run, and where the seconds come from."""

    gib: float
    seconds: float
    basis: str  # measured | scaled | lower bound on one H200


class Forecaster:
    """Holds finished runs; called with a config, forecasts its memory and time from them."""

    def __init__(self, finished: list[RunRecord]) -> None:
        self._by_shape: dict[str, list[RunRecord]] = {}
        self._by_pair: dict[str, list[RunRecord]] = {}
        for record in finished:
            if record.result is not None and "reused_from" not in record.result:
                self._by_shape.setdefault(_shape_key(flatten(record.config)), []).append(record)
                self._by_pair.setdefault(record.config["pair"]["label"], []).append(record)

    @classmethod
    def from_outputs(cls, outputs: Path) -> Forecaster:
        """A forecaster that has read the finished runs below `outputs`."""
        return cls([record for record in read_runs([outputs]) if record.is_done] if outputs.is_dir() else [])

    def __call__(self, config: RunConfig) -> Forecast:
        if same_shape := self._by_shape.get(_shape_key(deciding_values(config))):
            selector = config.selector.model_dump()
            same_selector = [record for record in same_shape if record.config["selector"] == selector] or same_shape
            peak = median(_peak_gib(record) for record in same_selector)
            return Forecast(peak, median(_seconds(record) for record in same_selector), "measured")
        gib = sum(memory_gib(config).values())
        if same_pair := self._by_pair.get(config.pair.label):
            rate = median(_flops(record.config) / _seconds(record) for record in same_pair)
            return Forecast(gib, flops(config) / rate, "scaled")
        return Forecast(gib, flops(config) / H200_FLOPS, "lower bound on one H200")


def flops(config: RunConfig) -> float:
    """Floating-point operations of a whole run: 2 P per token forward, 4 P backward; sampling counts as a forward."""
    return _flops(config.model_dump())


def _flops(config: dict) -> float:
    learner, evaluation, pair = config["learner"], config["eval"], config["pair"]
    teacher, student = (
        shape_of(pair[role]["path"], pair[role]["revision"]).parameters for role in ("teacher", "student")
    )
    length = config["data"]["max_prompt_tokens"] + MEAN_LENGTH * config["data"]["max_response_tokens"]
    rollouts = learner["num_steps"] * learner["prompts_per_step"] * learner["samples_per_prompt"]
    training = rollouts * length * (2 * teacher + (2 + 6) * student)
    evaluations = 1 + (learner["num_steps"] // evaluation["every"] if evaluation["every"] else 1)
    problems = sum(benchmark["num_problems"] or 500 for benchmark in evaluation["benchmarks"].values())
    tokens = problems * (evaluation["samples"] + evaluation["greedy"]) * MEAN_LENGTH * evaluation["max_tokens"]
    return training + tokens * 2 * (evaluations * student + evaluation["teacher"] * teacher)


def _seconds(record: RunRecord) -> float:
    assert record.result is not None
    return record.result["totals"]["wall_s"]


def _peak_gib(record: RunRecord) -> float:
    assert record.result is not None
    return record.result["memory"]["memory/process_peak_gib"]


def _shape_key(flat: dict) -> str:
    """All values that decide time and memory, as one string: the config without selector, seed, names and the like."""
    skipped = ("selector.", "seed", "name", "sweep", "logger.", "quadrants.", "ignore_memory")
    kept = {key: value for key, value in flat.items() if not key.startswith(skipped) and value is not None}
    return json.dumps(kept, sort_keys=True)
