"""W&B: a saved workspace that compares selectors, and the upload of offline runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tip_exp.records import metrics
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import RunRecord, find_runs, read_run
from tip_exp.utils.errors import DataError, first_line

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


def workspace(records: list[RunRecord], entity: str, project: str) -> Workspace:
    """Accuracy, cost and selection of the runs, grouped by selector and retention. Needs the extra `dashboards`."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise DataError(f"{error.name} is not installed; pip install 'tip_exp[dashboards]'") from error
    retention, selector = panels.Config("selector.retention"), panels.Config("selector.label")

    def curves(title: str, metric: str) -> panels.LinePlot:
        return panels.LinePlot(
            title=title, x="Step", y=[metric], groupby=selector, groupby_aggfunc="mean", groupby_rangefunc="minmax"
        )

    def against_retention(title: str, metric: str) -> panels.ScatterPlot:
        return panels.ScatterPlot(title=title, x=retention, y=panels.SummaryMetric(metric))

    accuracies = sorted(
        {
            metrics.EVAL + metrics.main_accuracy(benchmark, record.config["eval"]["samples"])
            for record in records
            for benchmark in record.config["eval"]["benchmarks"]
        }
    )
    measured = {name for record in records if record.result for name in record.result["memory"]}
    on_gpu = metrics.DEVICE_USED_PEAK_GIB in measured
    sweeps = sorted({sweep for record in records if (sweep := group_of(record))})
    sections: dict[str, list[Any]] = {
        "Accuracy": [
            *(curves(f"{name} by step", name) for name in accuracies),
            *(against_retention(f"{name} against retention", name) for name in accuracies),
        ],
        "Cost": [
            against_retention(
                "peak memory against retention", metrics.DEVICE_USED_PEAK_GIB if on_gpu else metrics.PROCESS_PEAK_GIB
            ),
            against_retention("memory of the loss against retention", metrics.extra_mib("loss")),
            panels.BarPlot(title="seconds per step", metrics=[metrics.seconds("step")], groupby=selector),
        ],
        "Kept tokens": [
            curves("kept fraction", metrics.KEPT_FRAC),
            curves("overlap with entropy", metrics.OVERLAP_ENTROPY),
            *(curves(f"kept of {name.upper()}", metrics.quadrant_kept_frac(name)) for name in metrics.QUADRANTS),
        ],
        "Learning": [curves("loss", metrics.LOSS), curves("divergence", metrics.score_mean("reverse_kl"))],
        "Samples": [panels.WeavePanelSummaryTable(table_name="samples")],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Selectors: {', '.join(sweeps) or 'single runs'}",
        sections=[
            ws.Section(name=name, panels=contents, is_open=name not in ("Learning", "Samples"))
            for name, contents in sections.items()
        ],
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group").isin(sweeps)] if sweeps else [],
            groupby=[ws.Config("selector.label"), ws.Config("selector.retention")],
        ),
    )


def save(made: Workspace) -> str:
    """Save the workspace and return its address. Raises DataError if W&B does not accept it."""
    from wandb.errors import Error

    try:
        return made.save().url
    except (Error, OSError) as error:
        raise DataError(f"W&B did not save the workspace: {first_line(error)}") from error


def group_of(record: RunRecord) -> str | None:
    """The W&B group that holds a run's metrics: its sweep, or for a linked run the sweep of the original."""
    original = RunFolder(Path((record.result or {}).get("reused_from", record.folder)))
    try:
        return read_run(original).config["sweep"]
    except (ValueError, OSError):  # it was removed or damaged since
        return record.config["sweep"]


def pending_uploads(roots: list[Path]) -> list[Path]:
    """Folders of offline runs below the roots that W&B has not marked as uploaded; parts of a run in order of time."""
    parts = [part for run in find_runs(roots) for part in sorted(run.wandb.glob("offline-run-*"))]
    return [part for part in parts if not _is_uploaded(part)]


def sync_command(folder: Path) -> list[str]:
    """A resumed run has several parts; the later ones go to the id of the run, which ends the folder's name."""
    is_first_part = folder == min(folder.parent.glob("offline-run-*"))
    run_id = [] if is_first_part else ["--id", folder.name.rsplit("-", 1)[1]]
    return [sys.executable, "-m", "wandb", "sync", "--yes", *run_id, str(folder)]


def upload(pending: list[Path]) -> list[Path]:
    """Upload each folder once, in order, and return those that failed: with an exit code, or without W&B's mark.

    If a part of a run fails, its later parts are not uploaded and count as failed. Raises ConnectionError without an
    API key.
    """
    if pending and not _has_key():
        raise ConnectionError("W&B has no API key: set WANDB_API_KEY or run `wandb login`")
    failed: list[Path] = []
    for folder in pending:
        if folder.parent in [earlier.parent for earlier in failed]:
            failed.append(folder)
            continue
        print(f"uploading {folder}", flush=True)
        if subprocess.run(sync_command(folder)).returncode != 0 or not _is_uploaded(folder):
            failed.append(folder)
    return failed


def _has_key() -> bool:
    import wandb

    wandb.setup(wandb.Settings(mode="online"))  # WANDB_MODE=offline, as during the runs, would hide the key
    return wandb.login(prompt=False, verify=False)


def _is_uploaded(folder: Path) -> bool:
    return any(folder.glob("*.wandb.synced"))
