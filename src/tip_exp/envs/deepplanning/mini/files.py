"""Writes generated tasks in the official file layout, and a correct plan for each."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tip_exp.envs.deepplanning.data import TABLES

Record = dict[str, str]


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """One task: its entry in the query file, its tables (an absent one gets no file), and a plan with full score.

    The rows of a table all have the same columns, which become the header.
    """

    query: dict[str, Any]  # id, query, meta_info
    tables: dict[str, list[Record]]
    oracle: str


def write(root: Path, tasks: Iterable[TaskFiles]) -> None:
    """ROOT/data/travelplanning_query_en.json, ROOT/database/database_en/id_<id>/… and ROOT/oracle/id_<id>.txt.

    The folder is written aside and renamed, so it is complete or absent. An existing folder is kept as it is.
    """
    if root.exists():
        return
    building = root.with_name(f".{root.name}.{os.getpid()}")
    queries = []
    for task in tasks:
        name = f"id_{task.query['id']}"
        _put(building / "oracle" / f"{name}.txt", task.oracle)
        queries.append(task.query | {"query_with_constraints": task.query["query"]})
        for table, rows in task.tables.items():
            path = building / "database" / "database_en" / name / TABLES[table]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    _put(building / "data" / "travelplanning_query_en.json", json.dumps(queries, ensure_ascii=False, indent=1))
    try:
        building.rename(root)
    except OSError:  # another process was first and wrote the same tasks
        shutil.rmtree(building)
        if not root.exists():
            raise


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
