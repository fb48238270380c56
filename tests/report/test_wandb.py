"""What would be sent to W&B: the workspace that compares selectors, and which offline runs still have to go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import synthetic_runs

from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import read_run
from tip_exp.report.wandb import Upload, group_of, sync_command, uploads

pytest.importorskip("wandb_workspaces")


@pytest.fixture
def folder(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> Path:
    for selector in ("full", "soft_or"):
        config = compose_run(f"selector={selector}", "sweep=demo")
        synthetic_runs.write_config(config, tmp_path / selector)
        synthetic_runs.finish(config, tmp_path / selector, 0.5)
    return tmp_path


def report(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`tip-report …`; `path`: a folder whose modules come before the installed ones."""
    line = [sys.executable, "-m", "tip_exp.report.cli", *arguments]
    known = os.environ.get("PYTHONPATH", "")
    environment = os.environ | ({"PYTHONPATH": f"{path}{os.pathsep}{known}"} if path else {})
    return subprocess.run(line, capture_output=True, text=True, timeout=100, env=environment)


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
    assert "kept of Q3" in panels and panels["kept of Q3"]["metrics"] == ["quadrant/q3_kept_frac"]


def test_a_linked_run_lies_in_the_group_of_its_original(folder: Path, compose_run: Callable[..., RunConfig]) -> None:
    config = compose_run("selector=full", "sweep=table5")
    linked = folder / "linked"
    synthetic_runs.write_config(config, linked)
    synthetic_runs.finish(config, linked, 0.5)
    assert group_of(read_run(RunFolder(linked))) == "table5"
    result = json.loads((linked / "result.json").read_text()) | {"reused_from": str(folder / "full")}
    (linked / "result.json").write_text(json.dumps(result))
    assert group_of(read_run(RunFolder(linked))) == "demo"


FAKE = """
import sys
from pathlib import Path

folder, log = Path(sys.argv[-1]), Path(__file__).parent / "calls"
with log.open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if "bad" in folder.name:
    sys.exit(3)
if "silent" not in folder.name:
    (folder / "run.wandb.synced").touch()
"""


@pytest.fixture
def offline(folder: Path) -> Callable[..., Path]:
    """Makes an offline W&B folder of a run."""

    def make(run: str, name: str, *, synced: bool = False) -> Path:
        made = folder / run / "wandb" / f"offline-run-{name}"
        made.mkdir(parents=True)
        (made / "run.wandb").touch()
        if synced:
            (made / "run.wandb.synced").touch()
        return made

    return make


def test_offline_runs_that_were_not_uploaded(folder: Path, offline: Callable[..., Path]) -> None:
    first, second = offline("full", "20260101-abc"), offline("full", "20260102-abc")
    offline("soft_or", "20260101-def", synced=True)
    assert uploads([folder]) == [Upload(first, goes_on=False), Upload(second, goes_on=True)]
    assert sync_command(Upload(second, goes_on=True))[1:] == [
        "-m",
        "wandb",
        "sync",
        "--yes",
        "--id",
        "abc",
        str(second),
    ]
    told = report("sync", str(folder), "--dry-run")
    assert told.returncode == 0 and "2 offline runs to upload" in told.stdout and str(first) in told.stdout


def test_sync_sends_each_folder_once_and_tells_what_failed(folder: Path, offline: Callable[..., Path]) -> None:
    """Against a stand-in for wandb: two parts of one run, one that fails, its later part, one that only says it did."""
    first, second = offline("full", "1-abc"), offline("full", "2-abc")
    bad, after_bad = offline("soft_or", "1-bad"), offline("soft_or", "2-xyz")
    (folder / "third").mkdir()
    (folder / "third" / "config.yaml").write_text((folder / "full" / "config.yaml").read_text())
    silent = offline("third", "1-silent")
    fake = folder / "fake" / "wandb"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text(FAKE)
    told = report("sync", str(folder), path=fake.parent)
    calls = (fake / "calls").read_text().splitlines()
    assert calls == [
        f"sync --yes {first}", f"sync --yes --id abc {second}", f"sync --yes {bad}", f"sync --yes {silent}",
    ]  # fmt: skip
    assert told.returncode == 1 and "2 of 5 offline runs uploaded" in told.stdout
    assert all(str(one) in told.stderr for one in (bad, after_bad, silent)) and str(first) not in told.stderr
    assert "Traceback" not in told.stderr
    again = report("sync", str(folder), path=fake.parent)
    assert (fake / "calls").read_text().splitlines()[4:] == [f"sync --yes {bad}", f"sync --yes {silent}"]
    assert "0 of 3 offline runs uploaded" in again.stdout
