"""Memory and time of a run before it starts, from finished runs where there are any.

Measured if a run of the same shape (same config but for seed, selector and name) is finished; else scaled by
floating-point operations from finished runs of the same pair; else by the model of `time` for the GPUs it needs.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tip_exp.config.parse import flatten
from tip_exp.config.schema import RunConfig
from tip_exp.estimate.cards import Card
from tip_exp.estimate.memory import RankMemory, ranks_needed, runs_on_cpu
from tip_exp.estimate.time import flops, run_time
from tip_exp.records.metrics import DEVICE_USED_PEAK_GIB, PROCESS_PEAK_GIB
from tip_exp.records.reader import read_runs

COMPUTED = "computed for"
NO_TIME = "no finished run of this pair"
TOO_LARGE = "fits no number of GPUs"


@dataclass(frozen=True, slots=True)
class Forecast:
    """GiB of a rank at its peak (of the process on a CPU), seconds of the run, and where the seconds come from.

    `cards`: GPUs that the numbers are for, 0 on a CPU; `seconds` is None if unknown.
    """

    gib: float
    seconds: float | None
    basis: str  # measured | scaled | COMPUTED N x CARD | NO_TIME | TOO_LARGE
    cards: int = 0


class Forecaster:
    """Holds the finished runs below a folder; called with a config, forecasts its memory and time on `card`."""

    def __init__(self, outputs: Path, card: Card) -> None:
        self.card = card
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
            peaks = [result["memory"] for _, result in runs]
            gib = median(peak.get(DEVICE_USED_PEAK_GIB) or peak[PROCESS_PEAK_GIB] for peak in peaks)
            return Forecast(gib, median(result["totals"]["wall_s"] for _, result in runs), "measured")
        on_cpu, same_pair = runs_on_cpu(config), self._by_pair.get(config.pair.label)
        ranks = None if on_cpu else ranks_needed(config, self.card.gib)
        gib = RankMemory(config, None if on_cpu else self.card.gib, ranks).peak()[1]
        if same_pair:
            rate = median(flops(run_config) / result["totals"]["wall_s"] for run_config, result in same_pair)
            return Forecast(gib, flops(values) / rate, "scaled", ranks or 0)
        if ranks is None:
            return Forecast(gib, None, NO_TIME if on_cpu else TOO_LARGE)
        return Forecast(gib, run_time(config, self.card, ranks).run_s, f"{COMPUTED} {ranks} x {self.card.name}", ranks)


def _shape_key(config: dict) -> str:
    """All values that decide time and memory, as one string: the config without selector, seed, names and the like."""
    skipped = ("selector.", "seed", "name", "sweep", "logger.", "quadrants.", "ignore_memory", "eval.teacher")
    kept = {key: value for key, value in flatten(config).items() if not key.startswith(skipped) and value is not None}
    return json.dumps(kept, sort_keys=True)
