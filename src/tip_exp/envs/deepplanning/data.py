"""Travel tasks and their tables, in the layout of the official release.

    ROOT/travelplanning/data/travelplanning_query_en.json            tasks; also in ROOT/data/ or ROOT/
    ROOT/travelplanning/database/database_en/id_7/trains/trains.csv  tables of a task; also in ROOT/database/ or ROOT/
All cells are read as text. Some official tasks lack a table; that is not an error.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tip_exp.utils.errors import DataError

LANGS = ("en", "zh")
BUDGET = "budget_constraint"
_LEG_COLUMNS = "origin_city destination_city dep_date route_index segment_index price"
TABLES = {  # file, and the columns that look-ups need; any other column may be missing
    "trains": ("trains/trains.csv", f"{_LEG_COLUMNS} train_no"),
    "flights": ("flights/flights.csv", f"{_LEG_COLUMNS} flight_no"),
    "hotels": ("hotels/hotels.csv", "name city price"),
    "attractions": ("attractions/attractions.csv", "attraction_name city attraction_type"),
    "restaurants": ("restaurants/restaurants.csv", "restaurant_name"),
    "locations": ("locations/locations_coords.csv", "poi_name latitude longitude"),
    "distances": ("transportation/distance_matrix.csv", "origin destination duration_minutes"),
}

Row = dict[str, str]  # one line of a CSV; cells that a short line lacks are ""


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
    """Language -> query file, from the first of the official folders under `root` that has one."""
    missing = "travelplanning_query_en.json or travelplanning_query_zh.json"
    return _find(root, "data", "travelplanning_query_{}.json", missing)


def find_databases(root: Path) -> dict[str, Path]:
    """Language -> folder of task folders. `root` may also be a database_en or database_zh folder itself."""
    return _find(root, "database", "database_{}", "database_en/ or database_zh/")


def load_tasks(root: Path, lang: str) -> list[Task]:
    """All tasks of one language, in the order of the query file."""
    files = find_queries(root)
    if lang not in files:
        raise DataError(f"no travelplanning_query_{lang}.json beside {next(iter(files.values()))}")
    path = files[lang]
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # wrong encoding or wrong JSON
        raise DataError(f"{path}: not JSON in UTF-8 ({error})") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of tasks, got {type(records).__name__}")
    return [_task(record, lang, f"{path}, task {index}") for index, record in enumerate(records)]


def task_folder(database: Path, task_id: str) -> Path:
    """Folder of a task's tables, `id_7/` or `7/`. Ids that could be a path outside `database` are refused."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", task_id):
        raise DataError(f"a task id consists of letters, digits, - and _; got {task_id!r}")
    for name in (f"id_{task_id}", task_id):
        if (database / name).is_dir():
            return database / name
    raise DataError(f"no folder id_{task_id}/ in {database}")


def read_table(folder: Path, table: str) -> list[Row] | None:
    """Rows of one of TABLES, cells as text; None if the file is missing, as for some official tasks."""
    file, key_columns = TABLES[table]
    path = folder / file
    if not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, restval="")
            if rows.fieldnames is None:
                return None
            if absent := [column for column in key_columns.split() if column not in rows.fieldnames]:
                raise DataError(f"{path}: no column {absent[0]!r}; columns are {', '.join(rows.fieldnames)}")
            return [{column: row[column] for column in rows.fieldnames} for row in rows]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV in UTF-8 ({error})") from None


def _task(record: Any, lang: str, where: str) -> Task:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, got {type(record).__name__}")
    for key, kind in (("id", (str, int)), ("query", str), ("meta_info", dict)):
        if not isinstance(record.get(key), kind):
            raise DataError(f"{where}: {key!r} is missing or has the wrong type")
    meta = record["meta_info"]
    constraints = meta.get("hard_constraints")
    if not isinstance(constraints, dict) or not all(isinstance(c, dict) for c in constraints.values()):
        raise DataError(f"{where}: meta_info.hard_constraints is missing or not an object of objects")
    if not isinstance(meta.get("days"), int):
        raise DataError(f"{where}: meta_info.days is missing or not a whole number")
    return Task(str(record["id"]), lang, record["query"], meta)


def _find(root: Path, part: str, name: str, missing: str) -> dict[str, Path]:
    """Language -> path of `name` in the first official folder of `part` that has one."""
    folders = (f"benchmark/deepplanning/travelplanning/{part}", f"travelplanning/{part}", part, ".")
    for folder in folders:
        paths = {lang: root / folder / name.format(lang) for lang in LANGS}
        if existing := {lang: path for lang, path in paths.items() if path.exists()}:
            return existing
    for lang in LANGS:
        if root.name == name.format(lang) and root.is_dir():
            return {lang: root}
    raise DataError(f"no {missing} in {', '.join(str(root / folder) for folder in folders[1:])}")
