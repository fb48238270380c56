"""What a run ends with, computed from its own files: result.json, which proves that it finished, and the model card."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from tip_exp.config.parse import digest
from tip_exp.config.schema import RunConfig
from tip_exp.records import metrics
from tip_exp.records.folder import RunFolder, read_budgets
from tip_exp.records.integrity import describe_files, with_checksum
from tip_exp.records.reader import Outcomes
from tip_exp.utils.io import read_rows, to_json, write_atomic
from tip_exp.utils.paths import PACKAGE
from tip_exp.utils.space import when_there_is_space

RISE_STEPS = 20  # with fewer, a quarter is a few steps, whose losses scatter
LOSS_RISE = 2.0  # last over first quarter of the steps, from which a run is not healthy


def write_result(
    config: RunConfig, folder: RunFolder, datasets: dict[str, Any], rollout: dict[str, Any], hardware: str
) -> dict[str, Any]:
    """Write and return the result: first and last evaluation, totals over the steps, memory peaks over all processes.

    The model card is written before it. `datasets`, `rollout` and `hardware` describe what was read, how rollouts were
    sampled and on what.
    """
    rows = read_rows(folder.metrics)
    result = {
        "name": config.name,
        "digest": digest(config),
        "start": metrics.of_stage(rows[0], metrics.EVAL),
        "teacher": metrics.of_stage(rows[0], metrics.TEACHER),
        "final": metrics.of_stage(rows[-1], metrics.EVAL),
        "outcomes": final_outcomes(folder.eval_rows),
        "totals": totals(rows),
        "memory": {key: max(row.get(key, 0.0) for row in rows) for key in rows[-1] if key.startswith(metrics.MEMORY)},
        "datasets": datasets,
        "rollout": rollout,
        "versions": {name: version(name) for name in ("tip_exp", "torch", "transformers", "hydra-core")}
        | {"python": platform.python_version()},
        "git_revision": git_revision(),
        "hardware": hardware,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "health": health(rows, read_budgets(folder.micro_batches)),
    }
    if folder.model.exists():
        folder.check_held()
        when_there_is_space(lambda: write_atomic(folder.card, model_card(config, result)), folder.card)
    result = with_checksum(result | {"files": describe_files(folder)})
    folder.check_held()
    when_there_is_space(lambda: write_atomic(folder.result, to_json(result, indent=2) + "\n"), folder.result)
    return result


def health(rows: list[dict[str, Any]], budgets: dict[int, int] | None = None) -> str:
    """ "healthy", or what went wrong: skipped steps, out of memory, a loss that rose LOSS_RISE-fold or more.

    The rise is the median loss of the last quarter of the steps over that of the first, in runs of RISE_STEPS steps or
    more. `budgets`: step of an out-of-memory error -> the most tokens of a micro-batch from then on.
    """
    steps = rows[1:]
    faults: list[str] = []
    non_finite = sum(bool(row.get(metrics.NON_FINITE)) for row in steps)
    skipped = sum(bool(row.get(metrics.SKIPPED)) for row in steps) - non_finite
    for count, what in ((non_finite, "not finite"), (skipped, "nothing kept")):
        if count:
            faults.append(f"skipped {count} of {len(steps)} steps ({what})")
    if budgets:
        faults.append(f"out of memory at step {min(budgets)}, then micro-batches of {min(budgets.values())} tokens")
    losses = [row[metrics.LOSS] for row in steps if row.get(metrics.LOSS) is not None]
    quarter, is_long = max(1, len(losses) // 4), len(losses) >= RISE_STEPS
    first, last = (median(part) if losses else 0.0 for part in (losses[:quarter], losses[-quarter:]))
    if is_long and first > 0 and last / first >= LOSS_RISE:
        faults.append(f"loss rose {last / first:.1f}-fold")
    return "; ".join(faults) or metrics.HEALTHY


def totals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Sums over the steps, seconds over training and evaluation.

    From the steps with diagnostics, absent without: tokens and kept tokens of Q3, and the mean overlap with entropy.
    """
    q3_share, q3_kept = metrics.quadrant_share("q3"), metrics.quadrant_kept_frac("q3")
    q3_rows = [(row[q3_share] * row[metrics.RESPONSE_TOKENS], row.get(q3_kept, 0)) for row in rows if q3_share in row]
    overlaps = [row[metrics.OVERLAP_ENTROPY] for row in rows if metrics.OVERLAP_ENTROPY in row]
    spans = metrics.seconds("step"), metrics.seconds("eval")
    sums: dict[str, float] = {
        "steps": rows[-1]["step"],
        "response_tokens": sum(row.get(metrics.RESPONSE_TOKENS, 0) for row in rows),
        "kept_tokens": sum(row.get(metrics.KEPT_TOKENS, 0) for row in rows),
        "wall_s": sum(row.get(span, 0) for row in rows for span in spans),
    }
    if q3_rows:
        sums["q3_tokens"] = sum(tokens for tokens, _ in q3_rows)
        sums["q3_kept_tokens"] = sum(tokens * kept for tokens, kept in q3_rows)
    if overlaps:
        sums["overlap_entropy"] = sum(overlaps) / len(overlaps)
    return sums


def final_outcomes(eval_rows: Path) -> Outcomes:
    """Scores by problem of the student's last evaluation; what each key holds is said in records/reader.py.

    Reads the file line by line, as evaluations of long responses reach gigabytes. Without a file there are none.
    """
    latest_step, latest = None, {}  # latest[benchmark][protocol][problem id] = (score, KL or None) of its responses
    start: dict[tuple[str, str], dict[str, float]] = {}  # of (benchmark, protocol): sums of the scores at step 0
    if eval_rows.exists():
        with eval_rows.open(encoding="utf-8", newline="\n") as lines:
            for row in map(json.loads, lines):
                if row["step"] != latest_step:
                    latest_step, latest = row["step"], {}
                if row["model"] == "student":
                    by_problem = latest.setdefault(row["benchmark"], {}).setdefault(row["protocol"], {})
                    responses = by_problem.setdefault(row["problem_id"], [])
                    responses.append((row["right"], row.get(metrics.SEQ_KL)))
                    if row["step"] == 0:
                        at_start = start.setdefault((row["benchmark"], row["protocol"]), {})
                        at_start[row["problem_id"]] = at_start.get(row["problem_id"], 0) + row["right"]
    outcomes: Outcomes = {}
    for benchmark, protocols in latest.items():
        greedy = protocols.get("greedy", {})
        by_problem = protocols.get("sampled") or greedy
        outcome = {
            "samples": len(next(iter(by_problem.values()))),
            "right": {problem: sum(score for score, _ in responses) for problem, responses in by_problem.items()},
        }
        if at_start := start.get((benchmark, "greedy" if by_problem is greedy else "sampled")):
            outcome["start"] = at_start
        if greedy and by_problem is not greedy:
            outcome["greedy"] = {problem: score for problem, ((score, _), *_) in greedy.items()}
        if all(kl is not None for responses in by_problem.values() for _, kl in responses):
            outcome[metrics.SEQ_KL] = {
                problem: sum(metrics.log_kl(kl) for _, kl in responses) / len(responses)
                for problem, responses in by_problem.items()
            }
        outcomes[benchmark] = outcome
    return outcomes


def model_card(config: RunConfig, result: dict[str, Any]) -> str:
    """README.md of the student's folder: base model, training data and settings, accuracy before and after."""
    base, totals, selector = config.pair.student.path, result["totals"], config.selector
    head = {"base_model": base, "library_name": "transformers", "tags": ["on-policy-distillation", "tip_exp"]}
    settings = yaml.safe_dump(config.model_dump(exclude={"logger"}), sort_keys=False)
    start, final = result["start"], result["final"]
    in_both = [name for name in final if start.get(name) is not None and final[name] is not None]
    scores = [f"| {name} | {start[name]:.4f} | {final[name]:.4f} |" for name in in_both]
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
    return "\n".join(lines)


def git_revision() -> str | None:
    """Commit of the checkout that this package runs from, with a + if files were changed; None outside of one."""
    root = PACKAGE.parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # git is not installed
        return None


def describe_hardware(device: torch.device, ranks: int) -> str:
    """What the run used: "8 x NVIDIA H200", or on a CPU its name and the number of threads."""
    if device.type == "cuda":
        return f"{ranks} x {torch.cuda.get_device_name(device)}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"
