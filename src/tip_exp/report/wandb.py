"""W&B dashboards: a saved workspace that compares selectors, and the upload of offline runs.

tip-report wandb outputs/sweeps/demo --entity me --project tip      (needs the extra `dashboards`, and a login)
tip-report wandb outputs/sweeps/demo --entity me --print            (what would be sent; sends nothing)
tip-report sync outputs/sweeps/demo                                 (offline runs that were not uploaded yet)
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import RunRecord, find_runs, gather, read_run

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

QUADRANTS = ("q1", "q2", "q3", "q4")


@dataclass(frozen=True, slots=True)
class Upload:
    """One offline folder that W&B does not have yet; `goes_on`: a later part of a run that was killed and resumed."""

    folder: Path
    goes_on: bool


def workspace(records: list[RunRecord], entity: str, project: str) -> Workspace:
    """Accuracy, cost and selection of the runs of these sweeps, grouped by selector and retention."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as ws

    accuracies = sorted({name for record in records for name in _accuracies(record)})
    sweeps = sorted({sweep for record in records if (sweep := group_of(record))})
    retention, selector = panels.Config("selector.retention"), panels.Config("selector.label")

    def curves(title: str, *metrics: str) -> panels.LinePlot:
        return panels.LinePlot(
            title=title, x="Step", y=list(metrics), groupby=selector, groupby_aggfunc="mean", groupby_rangefunc="minmax"
        )

    def against_retention(title: str, metric: str) -> panels.ScatterPlot:
        return panels.ScatterPlot(title=title, x=retention, y=panels.SummaryMetric(metric))

    accuracy: list[Any] = [curves(f"{name} by step", name) for name in accuracies]
    accuracy += [against_retention(f"{name} against retention", name) for name in accuracies]
    cost: list[Any] = [
        against_retention("peak memory against retention", "memory/process_peak_gib"),
        against_retention("memory of the loss against retention", "memory/loss_extra_mib"),
        panels.BarPlot(title="seconds a step", metrics=["time/step_s"], groupby=selector),
    ]
    selection: list[Any] = [
        curves("kept share", "select/kept_frac"),
        curves("overlap with entropy", "select/overlap_entropy"),
    ]
    selection += [curves(f"kept of {name.upper()}", f"quadrant/{name}_kept_frac") for name in QUADRANTS]
    learning: list[Any] = [curves("loss", "train/loss"), curves("divergence", "score/reverse_kl_mean")]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Selectors: {', '.join(sweeps) or 'single runs'}",
        sections=[
            ws.Section(name="Accuracy", panels=accuracy, is_open=True),
            ws.Section(name="Cost", panels=cost, is_open=True),
            ws.Section(name="What is kept", panels=selection, is_open=True),
            ws.Section(name="Learning", panels=learning, is_open=False),
            ws.Section(name="Samples", panels=[panels.WeavePanelSummaryTable(table_name="samples")], is_open=False),
        ],
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group").isin(sweeps)] if sweeps else [],
            groupby=[ws.Config("selector.label"), ws.Config("selector.retention")],
        ),
    )


def group_of(record: RunRecord) -> str | None:
    """The W&B group a run's numbers lie in: its sweep, or the sweep of the run that its files are linked from."""
    original = RunFolder(Path((record.result or {}).get("reused_from", record.folder)))
    config = read_run(original).config if original.config.exists() else record.config
    return config["sweep"]


def uploads(roots: list[Path]) -> list[Upload]:
    """Offline runs below the roots without W&B's mark of an upload; a resumed run has several, the oldest first."""
    found: list[Upload] = []
    for run in find_runs(roots):
        folders = sorted((run.root / "wandb").glob("offline-run-*"))
        for i, folder in enumerate(folders):
            if not _is_uploaded(folder):
                found.append(Upload(folder, goes_on=i > 0))
    return found


def sync_command(upload: Upload) -> list[str]:
    run_id = upload.folder.name.rsplit("-", 1)[1]
    goes_on = ["--id", run_id] if upload.goes_on else []
    return [sys.executable, "-m", "wandb", "sync", "--yes", *goes_on, str(upload.folder)]


def send(todo: list[Upload]) -> list[Upload]:
    """Upload each folder once, in order, and give those that W&B did not take.

    A run's later part waits for its earlier one. Taken means both: `wandb sync` ended well and left its mark.
    """
    failed: list[Upload] = []
    for upload in todo:
        waits = upload.goes_on and any(one.folder.parent == upload.folder.parent for one in failed)
        if not waits:
            print(f"uploading {upload.folder}", flush=True)
        if waits or subprocess.run(sync_command(upload)).returncode != 0 or not _is_uploaded(upload.folder):
            failed.append(upload)
    return failed


def _is_uploaded(folder: Path) -> bool:
    return any(folder.glob("*.wandb.synced"))


def _accuracies(record: RunRecord) -> list[str]:
    k = record.config["eval"]["samples"]
    return [f"eval/{name}/" + (f"mean@{k}" if k else "greedy") for name in record.config["eval"]["benchmarks"]]


def _build(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tip-report wandb", description="Save a workspace that compares selectors.")
    parser.add_argument("roots", nargs="*", type=Path, default=[Path("outputs")], help="folders that hold runs")
    parser.add_argument("--entity", required=True, help="the W&B user or team")
    parser.add_argument("--project", help="default: logger.project of the runs")
    parser.add_argument("--print", action="store_true", help="print what would be sent, send nothing")
    given = parser.parse_args(arguments)
    records = gather(given.roots)
    try:
        built = workspace(records, given.entity, given.project or records[0].config["logger"]["project"])
    except ImportError as error:
        sys.exit(f"error: {error.name} is not installed; pip install 'tip_exp[dashboards]'")
    if given.print:
        print(built._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2))
        return
    from wandb.errors import Error

    try:
        print(built.save().url)
    except (Error, OSError) as error:
        sys.exit(f"error: W&B did not take the workspace: {str(error).splitlines()[0]}")


def _sync(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tip-report sync", description="Upload offline W&B runs.")
    parser.add_argument("roots", nargs="*", type=Path, default=[Path("outputs")], help="folders that hold runs")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, upload nothing")
    given = parser.parse_args(arguments)
    gather(given.roots)
    todo = uploads(given.roots)
    if given.dry_run:
        lines = [shlex.join(sync_command(upload)) for upload in todo]
        print("\n".join([*lines, f"{len(todo)} offline runs to upload"]))
        return
    failed = send(todo)
    print(f"{len(todo) - len(failed)} of {len(todo)} offline runs uploaded")
    if failed:
        names = "".join(f"\n  {upload.folder}" for upload in failed)
        sys.exit(f"error: W&B did not take{names}\nthe same command tries them again")


def main(arguments: list[str]) -> None:
    """`wandb …` or `sync …`."""
    (_build if arguments[0] == "wandb" else _sync)(arguments[1:])
