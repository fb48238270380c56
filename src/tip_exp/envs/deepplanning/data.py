"""Travel tasks and their tables, as the official release lays them out.

    ROOT/travelplanning/data/travelplanning_query_en.json            tasks; also in ROOT/data/ or ROOT/
    ROOT/travelplanning/database/database_en/id_7/trains/trains.csv  a task's tables; also in ROOT/database/ or ROOT/
Everything is read as text. Some official tasks lack a table, which is no error.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tip_exp.envs.deepplanning.score.constraints import BUDGET
from tip_exp.utils.errors import DataError

LANGS = ("en", "zh")
TABLES = {
    "trains": "trains/trains.csv",
    "flights": "flights/flights.csv",
    "hotels": "hotels/hotels.csv",
    "attractions": "attractions/attractions.csv",
    "restaurants": "restaurants/restaurants.csv",
    "locations": "locations/locations_coords.csv",
    "distances": "transportation/distance_matrix.csv",
}
KEY_COLUMNS = {  # what rows are found by; others may be missing
    "trains": ("origin_city", "destination_city", "dep_date", "route_index", "segment_index", "train_no", "price"),
    "flights": ("origin_city", "destination_city", "dep_date", "route_index", "segment_index", "flight_no", "price"),
    "hotels": ("name", "city", "price"),
    "attractions": ("attraction_name", "city", "attraction_type"),
    "restaurants": ("restaurant_name",),
    "locations": ("poi_name", "latitude", "longitude"),
    "distances": ("origin", "destination", "duration_minutes"),
}
DATA_FAULTS = {
    "en79_budget": (
        "task 79 in English keeps its budget beside `hard_constraints`, where nothing scores it; the fix puts it in"
    ),
}
_CHECKOUT = "benchmark/deepplanning/"  # where a checkout of Qwen-Agent keeps the release
_QUERY_FOLDERS = (f"{_CHECKOUT}travelplanning/data", "travelplanning/data", "data", ".")
_DATABASE_FOLDERS = (f"{_CHECKOUT}travelplanning/database", "travelplanning/database", "database", ".")

Row = dict[str, str | None]  # one line of a CSV, every cell as it is written; None where the line is too short


@dataclass(frozen=True, slots=True)
class Task:
    """One trip to plan.

    Task(id="0", lang="en", query="I'm planning a two-day trip from Hefei to Nanjing …",
         meta={"org": "Hefei", "dest": ["Nanjing"], "days": 2, "people_number": 3, "room_number": 2,
               "depart_weekday": 3, "hard_constraints": {"budget_constraint": {"max_budget": 3000}, …}, …})
    The model sees only `query`; `meta` holds the answers.
    """

    id: str
    lang: str
    query: str
    meta: dict[str, Any]

    @property
    def days(self) -> int:
        return int(self.meta["days"])

    @property
    def constraints(self) -> dict[str, dict[str, Any]]:
        return self.meta["hard_constraints"]


def find_queries(root: Path) -> dict[str, Path]:
    """Language -> query file, from the first of the known folders under `root` that holds one."""
    for folder in _QUERY_FOLDERS:
        found = {lang: root / folder / f"travelplanning_query_{lang}.json" for lang in LANGS}
        if present := {lang: path for lang, path in found.items() if path.is_file()}:
            return present
    raise DataError(
        f"no travelplanning_query_en.json or travelplanning_query_zh.json in {_places(root, _QUERY_FOLDERS)}"
    )


def find_databases(root: Path) -> dict[str, Path]:
    """Language -> folder of task folders. `root` may also be one database_en or database_zh itself."""
    for folder in _DATABASE_FOLDERS:
        found = {lang: root / folder / f"database_{lang}" for lang in LANGS}
        if present := {lang: path for lang, path in found.items() if path.is_dir()}:
            return present
    for lang in LANGS:
        if root.name == f"database_{lang}" and root.is_dir():
            return {lang: root}
    raise DataError(f"no database_en/ or database_zh/ in {_places(root, _DATABASE_FOLDERS)}")


def load_tasks(root: Path, lang: str, fixes: Iterable[str] = ()) -> list[Task]:
    """All tasks of one language in the order of the file; `fixes` are names from DATA_FAULTS to mend."""
    fixes = frozenset(fixes)
    if unknown := sorted(fixes - DATA_FAULTS.keys()):
        raise DataError(f"no known data fault is called {unknown[0]!r}; there are {', '.join(DATA_FAULTS)}")
    files = find_queries(root)
    if lang not in files:
        raise DataError(f"no travelplanning_query_{lang}.json beside {next(iter(files.values()))}")
    path = files[lang]
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # wrong encoding or wrong JSON
        raise DataError(f"{path}: not JSON in UTF-8 ({error})") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: a list of tasks expected, got {type(records).__name__}")
    return [_task(record, lang, fixes, f"{path}, task {place}") for place, record in enumerate(records)]


def task_folder(database: Path, task_id: str) -> Path:
    """The tables of one task, `id_7/` or `7/`; ids that could lead out of `database` are refused."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", task_id):
        raise DataError(f"a task's id consists of letters, digits, - and _; got {task_id!r}")
    for name in (f"id_{task_id}", task_id):
        if (database / name).is_dir():
            return database / name
    raise DataError(f"no folder id_{task_id}/ in {database}")


def read_table(folder: Path, table: str) -> list[Row] | None:
    """Rows of one of TABLES, cells as text; None where the file is missing, as it is for some official tasks."""
    path = folder / TABLES[table]
    if not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file)
            header = next(lines, None)
            if header is None:
                return None
            if absent := [column for column in KEY_COLUMNS[table] if column not in header]:
                raise DataError(f"{path}: no column {absent[0]!r}; there are {', '.join(header)}")
            width = len(header)
            rows = (line[:width] + [None] * (width - len(line)) for line in lines if line)
            return [dict(zip(header, row, strict=True)) for row in rows]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV in UTF-8 ({error})") from None


def _task(record: Any, lang: str, fixes: frozenset[str], where: str) -> Task:
    if not isinstance(record, dict):
        raise DataError(f"{where}: an object expected, got {type(record).__name__}")
    for key, kind in (("id", (str, int)), ("query", str), ("meta_info", dict)):
        if not isinstance(record.get(key), kind):
            raise DataError(f"{where}: {key!r} is missing or of a wrong type")
    meta = dict(record["meta_info"])
    constraints = meta.get("hard_constraints")
    if not isinstance(constraints, dict) or not all(isinstance(c, dict) for c in constraints.values()):
        raise DataError(f"{where}: meta_info.hard_constraints is missing or not an object of objects")
    if not isinstance(meta.get("days"), int):
        raise DataError(f"{where}: meta_info.days is missing or not a whole number")
    task_id = str(record["id"])
    if "en79_budget" in fixes and (lang, task_id) == ("en", "79") and BUDGET in meta:
        meta["hard_constraints"] = constraints | {BUDGET: meta.pop(BUDGET)}
    return Task(task_id, lang, record["query"], meta)


def _places(root: Path, folders: tuple[str, ...]) -> str:
    return ", ".join(str(root / folder) for folder in folders[1:])
