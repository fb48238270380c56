"""The records of runs and the rows of finished ones; damaged runs are listed apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tip_exp.records.folder import RunFolder
from tip_exp.records.reader import RunRecord, read_all
from tip_exp.records.validate import check_metrics, check_samples
from tip_exp.report.tables import Table
from tip_exp.utils.errors import DataError, first_line
from tip_exp.utils.io import read_rows


@dataclass(frozen=True)
class RunFiles:
    """A finished run with the rows of its files."""

    arm: str  # ArmResult.name
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def read_records(roots: list[Path]) -> tuple[list[RunRecord], Table | None]:
    """The records of all whole runs below the roots, and a table of those that are damaged.

    Raises DataError if a root is neither a folder nor an archive, if no run is found, or if all are damaged.
    """
    for root in roots:
        if not root.exists():
            raise DataError(f"there is no {root}; give folders of runs, such as outputs/sweeps/demo, or NAME.runs.gz")
    records = read_all(roots)
    if not records:
        raise DataError(f"no run (a folder with config.yaml) below {', '.join(map(str, roots))}")
    rows = [[record.folder, f"damaged: {record.damage}"] for record in records if record.damage]
    if len(rows) == len(records):
        runs = "".join(f"\n  {folder}: {state}" for folder, state in rows)
        raise DataError(f"no whole run below {', '.join(map(str, roots))}:{runs}")
    damaged = Table("Damaged runs, which no other table counts", ["folder", "state"], rows) if rows else None
    return [record for record in records if not record.damage], damaged


def read_files(records: list[RunRecord], arms: dict[str, str]) -> tuple[list[RunFiles], list[list[str]]]:
    """The files of the runs, and folder and damage of those that cannot be read; `arms`: folder -> name of the arm."""
    runs: list[RunFiles] = []
    unread: list[list[str]] = []
    for record in records:
        try:
            runs.append(_read(record, arms[record.folder]))
        except (OSError, ValueError) as error:
            unread.append([record.folder, f"damaged: {first_line(error)}; not in plots and viewer"])
    return runs, unread


def _read(record: RunRecord, arm: str) -> RunFiles:
    """Raises ValueError or OSError if the rows cannot be read."""
    folder = RunFolder(Path(record.folder))
    samples = _rows(folder.samples)
    check_samples(samples)
    return RunFiles(arm, record.config, read_metrics(record), samples)


def read_metrics(record: RunRecord) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. Raises ValueError or OSError if they cannot be read."""
    rows = _rows(RunFolder(Path(record.folder)).metrics)
    check_metrics(rows)
    return rows


def _rows(path: Path) -> list[Any]:
    try:
        return read_rows(path)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is torn ({first_line(error)})") from None
