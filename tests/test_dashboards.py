"""What would be sent to W&B: the workspace that compares selectors, and which offline runs still have to go."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import synthetic_runs

from tip_exp.config import RunConfig
from tip_exp.dashboards import Upload, sync_command, uploads

pytest.importorskip("wandb_workspaces")


@pytest.fixture
def folder(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> Path:
    for selector in ("full", "soft_or"):
        config = compose_run(f"selector={selector}", "sweep=demo")
        synthetic_runs.write_config(config, tmp_path / selector)
        synthetic_runs.finish(config, tmp_path / selector, 0.5)
    return tmp_path


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tip_exp.report", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=100)


def test_the_workspace_that_would_be_sent(folder: Path) -> None:
    told = report("wandb", str(folder), "--entity", "team", "--print")
    assert told.returncode == 0, told.stderr
    sent: dict[str, Any] = json.loads(told.stdout)
    assert (sent["entity"], sent["project"], sent["displayName"]) == ("team", "tip", "Selectors: demo")
    section = sent["spec"]["section"]
    (runs,) = section["runSets"]
    assert "demo" in json.dumps(runs["filters"]) and "group" in json.dumps(runs["filters"])
    assert [one["name"] for one in runs["grouping"]] == ["selector.value.label", "selector.value.retention"]
    panels = {
        panel["config"].get("chartTitle"): panel["config"]
        for part in section["panelBankConfig"]["sections"]
        for panel in part["panels"]
    }
    curve = panels["eval/word_sums/mean@4 by step"]
    assert curve["metrics"] == ["eval/word_sums/mean@4"] and curve["groupBy"] == "selector.value.label"
    scatter = panels["peak memory against retention"]
    assert scatter["xAxis"] == "config:selector.value.retention"
    assert scatter["yAxis"] == "summary:memory/process_peak_gib"
    assert "samples" in told.stdout
    # what the panels read is what a run logs
    assert "kept of Q3" in panels and panels["kept of Q3"]["metrics"] == ["quadrant/q3_kept_frac"]


def test_offline_runs_that_were_not_uploaded(folder: Path) -> None:
    first, second = (folder / "full" / "wandb" / f"offline-run-2026010{i}-abc" for i in (1, 2))
    done = folder / "soft_or" / "wandb" / "offline-run-20260101-def"
    for run in (first, second, done):
        run.mkdir(parents=True)
        (run / "run-abc.wandb").write_text("")
    (done / "run-abc.wandb.synced").write_text("")
    assert uploads([folder]) == [Upload(first, goes_on=False), Upload(second, goes_on=True)]
    assert sync_command(Upload(second, goes_on=True))[1:] == ["sync", "--yes", "--id", "abc", str(second)]
    told = report("sync", str(folder), "--dry-run")
    assert told.returncode == 0 and "2 offline runs to upload" in told.stdout and str(first) in told.stdout
