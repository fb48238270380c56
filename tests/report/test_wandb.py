"""The W&B workspace that compares selectors, and the upload of offline runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.synthetic_runs import finish, write_config

from tip_exp.config.schema import RunConfig
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import read_run, read_runs
from tip_exp.report.wandb import group_of, pending_uploads, sync_command, workspace

pytest.importorskip("wandb_workspaces")


@pytest.fixture
def folder(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> Path:
    for selector in ("full", "soft_or"):
        config = compose_run(f"selector={selector}", "sweep=demo")
        write_config(config, tmp_path / selector)
        finish(config, tmp_path / selector, 0.5)
    return tmp_path


def report(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`tip-report …`; `path`: a folder whose modules are imported before the installed ones."""
    line = [sys.executable, "-m", "tip_exp.report.cli", *arguments]
    paths = [str(path)] if path else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(line, capture_output=True, text=True, timeout=100, env=environment)


def test_the_workspace_compares_selectors(folder: Path) -> None:
    import wandb_workspaces.reports.v2 as reports
    from wandb_workspaces.workspaces import Config

    made = workspace(read_runs([folder]), "team", "tip")
    assert (made.entity, made.project, made.name) == ("team", "tip", "Selectors: demo")
    assert "Group" in str(made.runset_settings.filters) and "['demo']" in str(made.runset_settings.filters)
    assert made.runset_settings.groupby == [Config("selector.label"), Config("selector.retention")]
    assert [section.name for section in made.sections] == ["Accuracy", "Cost", "Kept tokens", "Learning", "Samples"]
    curve, scatter = made.sections[0].panels
    assert curve.title == "eval/word_sums/mean@4 by step" and curve.y == ["eval/word_sums/mean@4"]
    assert curve.groupby == reports.Config("selector.label")
    assert scatter.x == reports.Config("selector.retention")
    assert scatter.y == reports.SummaryMetric("eval/word_sums/mean@4")
    memory = made.sections[1].panels[0]
    assert memory.y == reports.SummaryMetric("memory/process_peak_gib")
    path = folder / "full" / "result.json"
    path.write_text(path.read_text().replace("learner_peak_gib", "device_used_peak_gib"))
    memory = workspace(read_runs([folder]), "team", "tip").sections[1].panels[0]
    assert memory.y == reports.SummaryMetric("memory/device_used_peak_gib")
    assert [panel.y for panel in made.sections[2].panels] == [
        ["select/kept_frac"], ["select/overlap_entropy"], *([f"quadrant/q{i}_kept_frac"] for i in (1, 2, 3, 4)),
    ]  # fmt: skip


def test_the_command_prints_the_workspace(folder: Path) -> None:
    process = report("wandb", str(folder), "--entity", "team", "--project", "other", "--print")
    assert process.returncode == 0, process.stderr
    assert isinstance(json.loads(process.stdout), dict) and "Selectors: demo" in process.stdout
    assert '"other"' in process.stdout


def test_a_linked_run_is_in_the_group_of_its_original(folder: Path, compose_run: Callable[..., RunConfig]) -> None:
    config = compose_run("selector=full", "sweep=table5")
    linked = folder / "linked"
    write_config(config, linked)
    finish(config, linked, 0.5)
    assert group_of(read_run(RunFolder(linked))) == "table5"
    result = json.loads((linked / "result.json").read_text()) | {"reused_from": str(folder / "full")}
    (linked / "result.json").write_text(json.dumps(result))
    assert group_of(read_run(RunFolder(linked))) == "demo"


# Stands in for `python -m wandb`: records its calls, fails for "bad", and marks all but "silent" as uploaded.
FAKE_WANDB = """
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
def make_offline(folder: Path) -> Callable[..., Path]:
    """Makes an offline W&B folder of a run."""

    def make(run: str, name: str, *, synced: bool = False) -> Path:
        path = folder / run / "wandb" / f"offline-run-{name}"
        path.mkdir(parents=True)
        (path / "run.wandb").touch()
        if synced:
            (path / "run.wandb.synced").touch()
        return path

    return make


def test_uploads_are_the_offline_runs_without_a_mark(folder: Path, make_offline: Callable[..., Path]) -> None:
    first, second = make_offline("full", "20260101-abc"), make_offline("full", "20260102-abc")
    make_offline("soft_or", "20260101-def", synced=True)
    assert pending_uploads([folder]) == [first, second]
    assert sync_command(first)[1:] == ["-m", "wandb", "sync", "--yes", str(first)]
    assert sync_command(second)[1:] == ["-m", "wandb", "sync", "--yes", "--id", "abc", str(second)]
    process = report("sync", str(folder), "--dry-run")
    assert process.returncode == 0 and "2 offline runs to upload" in process.stdout and str(first) in process.stdout


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_sync_without_a_key_is_one_error(
    folder: Path, make_offline: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    make_offline("full", "1-abc")
    for name, value in (("HOME", str(folder)), ("NETRC", str(folder / "netrc")), ("WANDB_API_KEY", "")):
        monkeypatch.setenv(name, value)
    process = report("sync", str(folder))
    assert process.returncode == 1 and process.stderr.count("WANDB_API_KEY") == 1, process.stderr
    assert "uploading" not in process.stdout


def test_sync_uploads_each_folder_once_and_names_the_failed(folder: Path, make_offline: Callable[..., Path]) -> None:
    """Two parts of one run; a part that fails, with a later part; and a part that W&B does not mark."""
    first, second = make_offline("full", "1-abc"), make_offline("full", "2-abc")
    bad, after_bad = make_offline("soft_or", "1-bad"), make_offline("soft_or", "2-xyz")
    (folder / "third").mkdir()
    (folder / "third" / "config.yaml").write_text((folder / "full" / "config.yaml").read_text())
    silent = make_offline("third", "1-silent")
    fake = folder / "fake" / "wandb"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("Settings = setup = login = lambda *args, **options: True")
    (fake / "__main__.py").write_text(FAKE_WANDB)
    process = report("sync", str(folder), path=fake.parent)
    calls = (fake / "calls").read_text().splitlines()
    assert calls == [
        f"sync --yes {first}", f"sync --yes --id abc {second}", f"sync --yes {bad}", f"sync --yes {silent}",
    ]  # fmt: skip
    assert process.returncode == 1 and "2 of 5 offline runs uploaded" in process.stdout
    assert all(str(part) in process.stderr for part in (bad, after_bad, silent)) and str(first) not in process.stderr
    assert "Traceback" not in process.stderr
    process = report("sync", str(folder), path=fake.parent)
    assert (fake / "calls").read_text().splitlines()[4:] == [f"sync --yes {bad}", f"sync --yes {silent}"]
    assert "0 of 3 offline runs uploaded" in process.stdout
