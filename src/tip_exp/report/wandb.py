"""W&B: a saved workspace that compares selectors, and the upload of offline runs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tip_exp.records import metrics
from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import RunRecord, find_runs, read_run
from tip_exp.utils.errors import DataError, first_line

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


@dataclass(frozen=True, slots=True)
class Upload:
    """An offline folder that W&B does not have yet; `is_later_part`: a run that was killed and resumed has several."""

    folder: Path
    is_later_part: bool


def workspace(records: list[RunRecord], entity: str, project: str) -> Workspace:
    """Accuracy, cost and selection of the runs, grouped by selector and retention. Needs the extra `dashboards`."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as ws

    retention, selector = panels.Config("selector.retention"), panels.Config("selector.label")

    def curves(title: str, metric: str) -> panels.LinePlot:
        return panels.LinePlot(
            title=title, x="Step", y=[metric], groupby=selector, groupby_aggfunc="mean", groupby_rangefunc="minmax"
        )

    def against_retention(title: str, metric: str) -> panels.ScatterPlot:
        return panels.ScatterPlot(title=title, x=retention, y=panels.SummaryMetric(metric))

    evaluations = [record.config["eval"] for record in records]
    accuracies = sorted(
        {
            metrics.EVAL + metrics.main_accuracy(benchmark, evaluation["samples"])
            for evaluation in evaluations
            for benchmark in evaluation["benchmarks"]
        }
    )
    sweeps = sorted({sweep for record in records if (sweep := group_of(record))})
    sections: dict[str, list[Any]] = {
        "Accuracy": [
            *(curves(f"{name} by step", name) for name in accuracies),
            *(against_retention(f"{name} against retention", name) for name in accuracies),
        ],
        "Cost": [
            against_retention("peak memory against retention", metrics.PROCESS_PEAK_GIB),
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
    config = read_run(original).config if original.config.exists() else record.config
    return config["sweep"]


def uploads(roots: list[Path]) -> list[Upload]:
    """Offline runs below the roots that W&B has not marked as uploaded; parts of a resumed run in order of time."""
    pending: list[Upload] = []
    for run in find_runs(roots):
        parts = sorted(run.wandb.glob("offline-run-*"))
        pending += [Upload(part, is_later_part=i > 0) for i, part in enumerate(parts) if not _is_uploaded(part)]
    return pending


def sync_command(part: Upload) -> list[str]:
    """A later part is uploaded to the id of its run, which ends the folder's name."""
    run_id = ["--id", part.folder.name.rsplit("-", 1)[1]] if part.is_later_part else []
    return [sys.executable, "-m", "wandb", "sync", "--yes", *run_id, str(part.folder)]


def upload(pending: list[Upload]) -> list[Upload]:
    """Upload each folder once, in order, and return those that failed: with an exit code, or without W&B's mark.

    If a part of a run fails, its later parts are not uploaded and count as failed.
    """
    failed: list[Upload] = []
    for part in pending:
        if part.is_later_part and any(earlier.folder.parent == part.folder.parent for earlier in failed):
            failed.append(part)
            continue
        print(f"uploading {part.folder}", flush=True)
        if subprocess.run(sync_command(part)).returncode != 0 or not _is_uploaded(part.folder):
            failed.append(part)
    return failed


def _is_uploaded(folder: Path) -> bool:
    return any(folder.glob("*.wandb.synced"))
