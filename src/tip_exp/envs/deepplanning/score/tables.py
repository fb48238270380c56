"""A task's tables, indexed by exact trimmed names for the commonsense checks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tip_exp.envs.deepplanning.data import TABLES, Row, read_table
from tip_exp.envs.deepplanning.plan.schema import Activity, Day, Kind, Plan, activities, bare_city, number

_COORDINATES = re.compile(r"\s*([\-0-9.]+)\s*,\s*([\-0-9.]+)\s*$")
_CHINESE_CITY = re.compile(r"[\u4e00-\u9fa5]{2}")


@dataclass(frozen=True, slots=True)
class TaskTables:
    """Rows by name; the last row of a name counts, for distances the first. Empty where a table is missing."""

    hotels: dict[str, Row]
    attractions: dict[str, Row]
    restaurants: dict[str, Row]
    fares: dict[str, list[str]]  # flight or train number -> prices; a flight hides a train with the same number
    cities: dict[str, str]  # station or airport -> city
    coordinates: dict[str, str]  # place -> "lat,lon" as written; "" if not numeric
    minutes: dict[tuple[str, str], float | None]  # ("lat,lon", "lat,lon") -> minutes by road

    @classmethod
    def load(cls, folder: Path) -> TaskTables:
        """Reads the tables of one task folder; raises DataError if a file is not a CSV in UTF-8."""
        rows = {table: read_table(folder, table) or [] for table in TABLES}
        locations = _by_name(rows["locations"], "poi_name")
        roads = reversed(rows["distances"])
        return cls(
            hotels=_by_name(rows["hotels"], "name"),
            attractions=_by_name(rows["attractions"], "attraction_name"),
            restaurants=_by_name(rows["restaurants"], "restaurant_name"),
            fares=_fares(rows["trains"], "train_no") | _fares(rows["flights"], "flight_no"),
            cities=_cities(rows["flights"] + rows["trains"]),
            coordinates={name: _point(row) for name, row in locations.items()},
            minutes={(row["origin"], row["destination"]): number(row["duration_minutes"]) for row in roads},
        )

    def city_of(self, station: str) -> str | None:
        """City of a station or airport; for an unknown one its first two characters if both are Chinese."""
        if station in self.cities:
            return self.cities[station]
        match = _CHINESE_CITY.match(station)
        return match[0] if match else None

    def travel_minutes(self, origin: str, destination: str) -> float | None:
        """Minutes by road between two places, each a name or "lat,lon"; None if a place or the route is unknown."""
        start, end = self._coordinates(origin), self._coordinates(destination)
        return None if start is None or end is None else self.minutes.get((start, end))

    def _coordinates(self, name: str) -> str | None:
        if recorded := self.coordinates.get(name):
            return recorded
        match = _COORDINATES.match(name)
        latitude, longitude = (number(match[1]), number(match[2])) if match else (None, None)
        return None if latitude is None or longitude is None else f"{latitude},{longitude}"


@dataclass(frozen=True, slots=True)
class Trip:
    """A plan, its task's metadata and tables: the input of every commonsense check."""

    plan: Plan
    meta: dict[str, Any]
    tables: TaskTables

    @property
    def days(self) -> list[Day]:
        return self.plan.get("daily_plans") or []

    @property
    def home(self) -> str | None:
        """City where the trip starts and ends."""
        origin = self.meta.get("org")
        return None if origin is None else bare_city(origin)

    def activities(self, kind: Kind) -> list[Activity]:
        """All activities of one type, day by day."""
        return [activity for day in self.days for activity in activities(day, kind)]


def yuan(cell: str) -> int | None:
    """A recorded price in whole yuan; None if it is not a finite number."""
    price = number(cell)
    return round(price) if price is not None and math.isfinite(price) else None


def _by_name(rows: list[Row], column: str) -> dict[str, Row]:
    return {name: row for row in rows if (name := row.get(column, "").strip())}


def _point(row: Row) -> str:
    cells = [row.get(column, "").strip() for column in ("latitude", "longitude")]
    return ",".join(cells) if all(number(cell) is not None for cell in cells) else ""


def _fares(rows: list[Row], column: str) -> dict[str, list[str]]:
    fares: dict[str, list[str]] = {}
    for row in rows:
        if name := row.get(column, "").strip():
            fares.setdefault(name, []).append(row["price"])
    return fares


def _cities(rows: list[Row]) -> dict[str, str]:
    cities: dict[str, str] = {}
    for row in rows:
        for column, city_column in (("dep_station_name", "origin_city"), ("arr_station_name", "destination_city")):
            station, city = row.get(column, "").strip(), row[city_column].strip()
            if station and city:
                cities[station] = bare_city(city)
    return cities
