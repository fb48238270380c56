"""Folders of finished and unfinished runs, written without training: input for the tests of readers and reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig
from tip_exp.utils.io import to_json_lines

SE = {"mean": 0.015, "greedy": 0.01}


def write_config(config: RunConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump())))


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append JSON lines, as a run does."""
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json_lines(rows))


def finish(
    config: RunConfig,
    folder: Path,
    final: float,
    *,
    kept: int = 1000,
    problems: int = 40,
    hardware: str = "test",
    seq_kl: float | None = None,
    totals: dict[str, float] | None = None,
    in_train: dict[str, list[str]] | None = None,
) -> None:
    """Write result.json. `final`: mean@k on all benchmarks; the correct responses are those of the first problems.

    `seq_kl`: the KL of every response; None: it was not measured. `totals` are added to those of every run.
    """
    k = config.eval.samples
    right = np.zeros((problems, k), dtype=int)
    right.flat[: round(final * problems * k)] = 1
    benchmarks = list(config.eval.benchmarks)

    def accuracies(mean: float) -> dict[str, float]:
        values = {f"mean@{k}": mean, f"mean@{k}_se": SE["mean"], "greedy": mean + 0.05, "greedy_se": SE["greedy"]}
        values |= {f"strict_mean@{k}": mean - 0.02} | ({} if seq_kl is None else {"seq_kl": seq_kl})
        return {f"{benchmark}/{name}": value for benchmark in benchmarks for name, value in values.items()}

    by_problem = {f"p{i}": int(row.sum()) for i, row in enumerate(right)}
    at_start = {problem: k if i < round(0.35 * problems) else 0 for i, problem in enumerate(by_problem)}
    outcome: dict[str, Any] = {"samples": k, "right": by_problem, "start": at_start}
    outcome["greedy"] = {problem: i < round((final + 0.05) * problems) for i, problem in enumerate(by_problem)}
    if seq_kl is not None:
        outcome["seq_kl"] = dict.fromkeys(by_problem, math.log(seq_kl + 1e-3))
    result = {
        "name": config.name, "digest": digest(config),
        "teacher": accuracies(0.99), "start": accuracies(0.35), "final": accuracies(final),
        "outcomes": dict.fromkeys(benchmarks, outcome),
        "totals": {"steps": config.learner.num_steps, "kept_tokens": kept, "response_tokens": 2 * kept, "wall_s": 41.6}
        | (totals or {}),
        "datasets": dict.fromkeys(benchmarks, {"rows": problems} | (in_train or {})),
        "memory": {
            "memory/loss_extra_mib": 13.52, "memory/process_peak_gib": 0.603, "memory/learner_peak_gib": 0.5,
        },
        "versions": {"tip_exp": "0.1.0", "torch": "2.13.0"},
        "hardware": hardware, "git_revision": "0123456789abcdef0123456789abcdef+",
        "finished_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result, indent=2))
