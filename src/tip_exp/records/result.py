"""result.json: the proof that a run is done, made from its own metrics and renamed into place."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.records.outcomes import final_outcomes
from tip_exp.utils.io import read_rows
from tip_exp.utils.paths import PACKAGE


def write_result(
    config: RunConfig, folder: RunFolder, datasets: dict[str, Any], rollout: dict[str, Any]
) -> dict[str, Any]:
    """Sum up metrics.jsonl: first and last evaluation, totals over all steps, peaks over all processes of the run."""
    rows = read_rows(folder.metrics)
    result = {
        "name": config.name,
        "digest": digest(config),
        "start": _with_prefix(rows[0], "eval/"),
        "teacher": _with_prefix(rows[0], "teacher/"),
        "final": _with_prefix(rows[-1], "eval/"),
        "outcomes": final_outcomes(folder.eval_rows),
        "totals": {
            "steps": rows[-1]["step"],
            "response_tokens": sum(row.get("select/response_tokens", 0) for row in rows),
            "kept_tokens": sum(row.get("select/kept_tokens", 0) for row in rows),
            "wall_s": sum(row.get("time/step_s", 0) + row.get("time/eval_s", 0) for row in rows),
        },
        "memory": {key: max(row.get(key, 0.0) for row in rows) for key in rows[-1] if key.startswith("memory/")},
        "datasets": datasets,
        "rollout": rollout,
        "versions": {name: version(name) for name in ("tip_exp", "torch", "transformers", "hydra-core")}
        | {"python": platform.python_version()},
        "git_revision": git_revision(),
        "hardware": hardware(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    aside = folder.result.with_suffix(".writing")
    aside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    aside.replace(folder.result)
    return result


def write_card(config: RunConfig, result: dict[str, Any], folder: Path) -> None:
    """README.md of the student's folder: a model card with what it was trained on, how, and what came out."""
    base, totals, selector = config.pair.student.path, result["totals"], config.selector
    head = {"base_model": base, "library_name": "transformers", "tags": ["on-policy-distillation", "tip_exp"]}
    settings = yaml.safe_dump(config.model_dump(exclude={"logger"}), sort_keys=False)
    scores = [f"| {name} | {result['start'][name]:.4f} | {value:.4f} |" for name, value in result["final"].items()]
    lines = [
        f"---\n{yaml.safe_dump(head)}---\n# {config.name}\n",
        f"`{base}` after {totals['steps']} steps of on-policy distillation from `{config.pair.teacher.path}`, on",
        f"{totals['kept_tokens']:,.0f} of {totals['response_tokens']:,.0f} response tokens",
        f"(selector {selector.label}, retention {selector.retention:g}).\n",
        "| evaluation | step 0 | final |",
        "|---|---|---|",
        *scores,
        f"\nConfig digest {result['digest']}, {result['hardware']}, revision {result['git_revision']}.\n",
        f"```yaml\n{settings}```\n",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def git_revision() -> str | None:
    """Commit of the checkout this package runs from, with a + if it has changes; None outside of one."""
    root = PACKAGE.parents[1]
    if not (root / ".git").exists():
        return None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    changes = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True)
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "") if commit.returncode == 0 else None


def hardware() -> str:
    """The GPU if there is one, else the CPU's name and threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    name = names[0].split(":", 1)[1].strip() if names else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def _with_prefix(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}
