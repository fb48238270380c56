"""Writes generated tasks as the official release lays its files out, with an oracle's plan beside."""

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
_LEG = "origin_city destination_city dep_date dep_station_code dep_station_name arr_station_code arr_station_name"
_LEG += " dep_datetime arr_datetime duration"
_SEAT = "seat_class seat_status"
_END = "price segment_index route_index"
COLUMNS = {  # of the official files, in their order
    "trains": f"{_LEG} train_no train_type {_SEAT} {_END}",
    "flights": f"{_LEG} flight_no airline {_SEAT} equip_type equip_size manufacturer {_END}",
    "hotels": "city name address latitude longitude decoration_time hotel_star price score brand services",
    "attractions": (
        "city attraction_name attraction_id description attraction_type address latitude longitude rating "
        "opening_time closing_time closing_dates min_visit_hours max_visit_hours ticket_price"
    ),
    "restaurants": (
        "restaurant_id restaurant_name city latitude longitude price_per_person cuisine opening_time closing_time "
        "nearby_attraction_name nearby_attraction_coords query_latitude query_longitude rating tags"
    ),
    "locations": "poi_name latitude longitude address poi_type",
    "distances": "origin destination distance_meters duration_minutes cost",
}


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """One task: its entry in the query file, its tables (one that is left out has no file), and a right plan."""

    query: dict[str, Any]  # id, query, meta_info
    tables: dict[str, list[Record]]
    oracle: str


def write(root: Path, tasks: Iterable[TaskFiles]) -> None:
    """ROOT/data/travelplanning_query_en.json, ROOT/database/database_en/id_<id>/… and ROOT/oracle/id_<id>.txt.

    The folder appears whole or not at all; one that is there already is left as it is.
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
                writer = csv.DictWriter(file, COLUMNS[table].split(), restval="")
                writer.writeheader()
                writer.writerows(rows)
    _put(building / "data" / "travelplanning_query_en.json", json.dumps(queries, ensure_ascii=False, indent=1))
    try:
        building.rename(root)
    except OSError:  # another run was quicker; the same tasks are there
        shutil.rmtree(building)
        if not root.exists():
            raise


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
