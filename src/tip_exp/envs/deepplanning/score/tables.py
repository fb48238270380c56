"""A task's tables as the commonsense checks look things up in them: by exact, trimmed names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tip_exp.envs.deepplanning.data import Row, read_table
from tip_exp.envs.deepplanning.plan.schema import Activity, Day, Plan
from tip_exp.envs.deepplanning.plan.schema import activities as of_day

T = TypeVar("T")
_COORDINATES = re.compile(r"\s*([\-0-9.]+)\s*,\s*([\-0-9.]+)\s*$")
_HAN_CITY = re.compile(r"[\u4e00-\u9fa5]{2}")
_BRACKETS = re.compile(r"[（(].*?[)）]")


@dataclass(frozen=True, slots=True)
class World:
    """Rows by name; of rows with one name the last stands, of distances the first. Empty where a table is missing."""

    hotels: dict[str, Row]
    attractions: dict[str, Row]
    restaurants: dict[str, Row]
    fares: dict[str, list[str | None]]  # prices on record by flight or train number; flights hide trains of that number
    cities: dict[str, str]  # station or airport -> city
    places: dict[str, str]  # "lat,lon" as written; "" where they are no numbers
    minutes: dict[tuple[str, str], float | None]  # ("lat,lon", "lat,lon") -> minutes on the road

    @classmethod
    def load(cls, folder: Path) -> World:
        """Read the tables of one task folder; raises DataError where a file is no CSV in UTF-8."""
        flights, trains = read_table(folder, "flights") or [], read_table(folder, "trains") or []
        return cls(
            hotels=_by_name(read_table(folder, "hotels"), "name", _itself),
            attractions=_by_name(read_table(folder, "attractions"), "attraction_name", _itself),
            restaurants=_by_name(read_table(folder, "restaurants"), "restaurant_name", _itself),
            fares=_fares(trains, "train_no") | _fares(flights, "flight_no"),
            cities=_cities(flights) | _cities(trains),
            places=_by_name(read_table(folder, "locations"), "poi_name", _point),
            minutes=_minutes(read_table(folder, "distances") or []),
        )

    def city_of(self, station: str) -> str | None:
        """City of a station or airport; of an unknown one its first two Chinese characters, if it begins with such."""
        if station in self.cities:
            return self.cities[station]
        match = _HAN_CITY.match(station)
        return match[0] if match else None

    def travel_minutes(self, origin: str, destination: str) -> float | None:
        """Minutes on the road between two places, by name or "lat,lon"; None where one or the way is not on record."""
        start, end = self._coordinates(origin), self._coordinates(destination)
        return None if start is None or end is None else self.minutes.get((start, end))

    def _coordinates(self, name: str) -> str | None:
        if on_record := self.places.get(name):
            return on_record
        match = _COORDINATES.match(name)
        latitude, longitude = (number(match[1]), number(match[2])) if match else (None, None)
        return None if latitude is None or longitude is None else f"{latitude},{longitude}"


@dataclass(frozen=True, slots=True)
class Trip:
    """One plan beside its task and the task's tables: all that a commonsense check may look at."""

    plan: Plan
    meta: dict[str, Any]
    world: World

    @property
    def days(self) -> list[Day]:
        return self.plan.get("daily_plans") or []

    def activities(self, kind: str) -> list[Activity]:
        """All activities of one type, day after day."""
        return [activity for day in self.days for activity in of_day(day, kind)]


def bare_city(name: str | None) -> str | None:
    """A city without what stands in brackets: "Suzhou (Jiangsu)" -> "Suzhou"."""
    return None if name is None else _BRACKETS.sub("", name).strip()


def number(value: str | None) -> float | None:
    """A cell as a number; None where it is none."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def yuan(value: str | None) -> int | None:
    """A price on record in whole yuan; None where there is none to compare with."""
    price = number(value)
    return round(price) if price is not None and math.isfinite(price) else None


def _by_name(rows: list[Row] | None, column: str, value: Callable[[Row], T]) -> dict[str, T]:
    return {name: value(row) for row in rows or [] if (name := (row.get(column) or "").strip())}


def _itself(row: Row) -> Row:
    return row


def _point(row: Row) -> str:
    cells = [(row.get(column) or "").strip() for column in ("latitude", "longitude")]
    return ",".join(cells) if all(number(cell) is not None for cell in cells) else ""


def _fares(rows: list[Row], column: str) -> dict[str, list[str | None]]:
    fares: dict[str, list[str | None]] = {}
    for row in rows:
        if name := (row.get(column) or "").strip():
            fares.setdefault(name, []).append(row.get("price"))
    return fares


def _cities(rows: list[Row]) -> dict[str, str]:
    cities: dict[str, str] = {}
    for row in rows:
        for station, city in (("dep_station_name", "origin_city"), ("arr_station_name", "destination_city")):
            name, home = (row.get(station) or "").strip(), (row.get(city) or "").strip()
            if name and home:
                cities[name] = bare_city(home) or ""
    return cities


def _minutes(rows: list[Row]) -> dict[tuple[str, str], float | None]:
    minutes: dict[tuple[str, str], float | None] = {}
    for row in rows:
        way = (row.get("origin") or "", row.get("destination") or "")
        minutes.setdefault(way, number(row.get("duration_minutes")))
    return minutes
