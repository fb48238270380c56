"""Run folders as a finished run leaves them, made in a moment: what the tests of reports read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig

SE = {"mean": 0.015, "greedy": 0.01}


def write_config(config: RunConfig, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump())))


def finish(
    config: RunConfig,
    folder: Path,
    final: float,
    *,
    kept: int = 1000,
    problems: int = 40,
    hardware: str = "test",
    outcomes: bool = True,
) -> None:
    """Write result.json: `final` is the accuracy on every benchmark, reached on the first problems."""
    k = config.eval.samples
    right = np.zeros((problems, k), dtype=int)
    right.flat[: round(final * problems * k)] = 1
    names = list(config.eval.benchmarks)

    def scores(value: float) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in names:
            found |= {f"{name}/mean@{k}": value, f"{name}/mean@{k}_se": SE["mean"]}
            found |= {f"{name}/greedy": value + 0.05, f"{name}/greedy_se": SE["greedy"]}
        return found

    result = {
        "name": config.name, "digest": digest(config),
        "teacher": scores(0.99), "start": scores(0.35), "final": scores(final),
        "totals": {"steps": config.learner.num_steps, "kept_tokens": kept, "response_tokens": 2 * kept, "wall_s": 41.6},
        "memory": {
            "memory/loss_extra_mib": 13.52, "memory/process_peak_gib": 0.603, "memory/learner_peak_gib": 0.5,
        },
        "hardware": hardware, "git_revision": "abc", "finished_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    by_problem = {f"p{i}": int(row.sum()) for i, row in enumerate(right)}
    if outcomes:
        result["outcomes"] = {name: {"samples": k, "right": by_problem} for name in names}
    else:
        rows = [
            {"step": step, "model": "student", "benchmark": name, "problem_id": f"p{i}", "sample": j,
             "right": bool(step and right[i, j]), "protocol": "sampled", "text": "…\u2028"}
            for step in (0, config.learner.num_steps) for name in names for i in range(problems) for j in range(k)
        ]  # fmt: skip
        (folder / "eval.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "result.json").write_text(json.dumps(result, indent=2))
