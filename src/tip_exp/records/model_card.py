"""The model card of a trained student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tip_exp.config.schema import RunConfig


def write_card(config: RunConfig, result: dict[str, Any], folder: Path) -> None:
    """Write README.md in the student's folder: base model, training data and settings, accuracy before and after."""
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
