"""Three demo sweeps at their smallest, then every report: table, page, results/README.md and W&B workspace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.report.test_page import page_data

from tip_exp.records.reader import read_runs
from tip_exp.utils.io import read_rows
from tip_exp.utils.paths import conf_dir

SMALL = ["learner.num_steps=2", "learner.warmup_steps=0", "learner.prompts_per_step=4", "num_threads=1", "seed=0"]
SMALL += ["learner.checkpoint_every=2", "logger.rollouts_per_eval=2"]


def command(cwd: Path, module: str, *arguments: str) -> str:
    line = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_sweeps_to_the_readme(tmp_path: Path) -> None:
    sweeps = ["-cd", str(conf_dir().parent / "sweeps"), "-cn"]
    words = ["experiment=quick", "eval.benchmarks.word_sums.num_problems=6"]
    tools = ["experiment=quick_tools", "eval.benchmarks.mini_travel.num_problems=4"]
    command(tmp_path, "tip_exp", *sweeps, "demo_table6", *words, *SMALL)
    command(tmp_path, "tip_exp", *sweeps, "demo_table8", *words, *SMALL)
    two = 'hydra.sweeper.runs=["selector=full","selector=q3"]'
    command(tmp_path, "tip_exp", *sweeps, "demo_table7", *tools, *SMALL, two)
    records = read_runs([tmp_path / "outputs" / "quick"])
    assert len(records) == 3 + 3 + 2 and all(record.is_done for record in records)
    printed = command(tmp_path, "tip_exp.report.cli", "results", "outputs/quick", "--out", "results")
    assert "README.md written" in printed
    readme = (tmp_path / "results" / "README.md").read_text()
    for part in ("## demo_table6", "Soft-OR, lowest", "## demo_table7", "mini_travel", "Divergence-only", "0 of 12"):
        assert part in readme, part
    assert "1 linked from another sweep" in readme  # table 8's baseline is table 6's
    assert "`tip-exp -cd sweeps -cn demo_table6 seed=0 experiment=quick" in readme
    command(tmp_path, "tip_exp.report.cli", "outputs/quick", "--html", "report.html")
    data = page_data((tmp_path / "report.html").read_text())
    assert {key.split("-")[1] for key in data["plots"]} == {
        "accuracy", "divergence", "prediction", "curves", "memory", "quadrants", "plane", "overlap",
    }  # fmt: skip
    for rollout in data["rollouts"]:
        assert len(rollout["tokens"]) == len(rollout["kept"]) == len(rollout["entropy"]), rollout["run"]
    check_that_the_workspace_reads_logged_metrics(tmp_path)


def check_that_the_workspace_reads_logged_metrics(root: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    sent = json.loads(
        command(root, "tip_exp.report.cli", "wandb", "outputs/quick/demo_table6", "--entity", "e", "--print")
    )
    panels = [panel for part in sent["spec"]["section"]["panelBankConfig"]["sections"] for panel in part["panels"]]
    read = {metric for panel in panels for metric in panel["config"].get("metrics", [])}
    read |= {panel["config"]["yAxis"].removeprefix("summary:") for panel in panels if "yAxis" in panel["config"]}
    logged: set[str] = set()
    for metrics in root.glob("outputs/quick/demo_table6/*/metrics.jsonl"):
        logged |= {key for row in read_rows(metrics) for key in row}
    assert len(read) > 10 and read <= logged, read - logged
