"""How long a run takes, before it starts.

Measured if a run of the same shape (same config but for seed, selector and name) is finished; else scaled by
floating-point operations from finished runs of the same pair; else a lower bound for one H200. Training uses one GPU,
so a run that no H200 holds has no time.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tip_exp.config.parse import flatten
from tip_exp.config.schema import RunConfig
from tip_exp.estimate.memory import memory_gib, on_gpu
from tip_exp.estimate.shapes import shape_of
from tip_exp.records.metrics import PROCESS_PEAK_GIB
from tip_exp.records.reader import read_runs

H200_FLOPS = 0.4 * 989e12  # per second: 40 % of the dense bfloat16 peak
H200_GIB = 139
TOO_LARGE = "does not fit one GPU"
MEAN_LENGTH = 0.5  # mean response length as a share of the maximum


@dataclass(frozen=True, slots=True)
class Forecast:
    """GiB of the learner's process, seconds of the run, and where the seconds come from.

    `seconds` is None if the run does not fit one H200; `gib` is then what a GPU would have to hold.
    """

    gib: float
    seconds: float | None
    basis: str  # measured | scaled | lower bound on one H200 | does not fit one GPU


class Forecaster:
    """Holds the finished runs below a folder; called with a config, forecasts its memory and time from them."""

    def __init__(self, outputs: Path) -> None:
        # (config, result) of each run
        self._by_shape: dict[str, list[tuple[dict, dict]]] = defaultdict(list)
        self._by_pair: dict[str, list[tuple[dict, dict]]] = defaultdict(list)
        for record in read_runs([outputs]) if outputs.is_dir() else []:
            if record.result is not None and "reused_from" not in record.result:
                self._by_shape[_shape_key(record.config)].append((record.config, record.result))
                self._by_pair[record.config["pair"]["label"]].append((record.config, record.result))

    def __call__(self, config: RunConfig) -> Forecast:
        values = config.model_dump()
        if same_shape := self._by_shape.get(_shape_key(values)):
            runs = [run for run in same_shape if run[0]["selector"] == values["selector"]] or same_shape
            gib = median(result["memory"][PROCESS_PEAK_GIB] for _, result in runs)
            return Forecast(gib, median(result["totals"]["wall_s"] for _, result in runs), "measured")
        parts = memory_gib(config)
        gib, gpu_gib = sum(parts.values()), sum(on_gpu(parts).values())
        if config.device != "cpu" and gpu_gib > H200_GIB:
            return Forecast(gpu_gib, None, TOO_LARGE)
        if same_pair := self._by_pair.get(config.pair.label):
            rate = median(flops(run_config) / result["totals"]["wall_s"] for run_config, result in same_pair)
            return Forecast(gib, flops(values) / rate, "scaled")
        return Forecast(gib, flops(values) / H200_FLOPS, "lower bound on one H200")


def flops(config: dict) -> float:
    """Floating-point operations of a whole run: 2 P per token forward, 4 P backward; sampling counts as a forward."""
    learner, evaluation, pair = config["learner"], config["eval"], config["pair"]
    models = pair["teacher"], pair["student"]
    teacher, student = (shape_of(model["path"], model["revision"]).parameters for model in models)
    length = config["data"]["max_prompt_tokens"] + MEAN_LENGTH * config["data"]["max_response_tokens"]
    rollouts = learner["num_steps"] * learner["prompts_per_step"] * learner["samples_per_prompt"]
    training = rollouts * length * (2 * teacher + (2 + 6) * student)
    evaluations = 1 + (learner["num_steps"] // evaluation["every"] if evaluation["every"] else 1)
    problems = sum(benchmark["num_problems"] or 500 for benchmark in evaluation["benchmarks"].values())
    tokens = problems * (evaluation["samples"] + evaluation["greedy"]) * MEAN_LENGTH * evaluation["max_tokens"]
    return training + tokens * 2 * (evaluations * student + evaluation["teacher"] * teacher)


def _shape_key(config: dict) -> str:
    """All values that decide time and memory, as one string: the config without selector, seed, names and the like."""
    skipped = ("selector.", "seed", "name", "sweep", "logger.", "quadrants.", "ignore_memory")
    kept = {key: value for key, value in flatten(config).items() if not key.startswith(skipped) and value is not None}
    return json.dumps(kept, sort_keys=True)
