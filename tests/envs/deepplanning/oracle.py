"""Builds a plan for a generated trip that passes every check and satisfies every constraint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tip_exp.envs.deepplanning.data import Row
from tip_exp.envs.deepplanning.plan.schema import Activity, Day, Kind, Plan, total_cost

Road = Callable[[str, str], tuple[int, int, int]]  # origin, destination -> meters, minutes, taxi fare
NINE, LUNCH, DINNER, MIDNIGHT = 9 * 60, 11 * 60 + 30, 17 * 60 + 30, 24 * 60


@dataclass(frozen=True, slots=True)
class Stops:
    """Rows of the tables that the plan uses."""

    mode: str  # train or flight
    out: Row
    back: Row
    hotel: Row
    must_see: list[Row]
    must_eat: Row
    sights: list[Row]
    restaurants: list[Row]


def oracle_plan(stops: Stops, road: Road, origin: str, city: str, days: int, meta: dict[str, Any]) -> Plan:
    """A plan in the official JSON layout that satisfies every constraint and passes every commonsense check."""
    todo = stops.must_see + [s for s in stops.sights if s not in stops.must_see and not s["closing_dates"]]
    eaten: set[str] = set()
    made = [_day(number, days, stops, road, origin, city, todo, eaten) for number in range(1, days + 1)]
    return {"budget_summary": {"total_estimated_budget": round(total_cost(made, meta))}, "daily_plans": made}


def _day(
    number: int, days: int, stops: Stops, road: Road, origin: str, city: str, todo: list[Row], eaten: set[str]
) -> Day:
    first, last = number == 1, number == days
    hotel = stops.hotel["name"]
    clock = _Clock(road, now=8 * 60, at=hotel)
    if first:
        clock.ride(stops.mode, stops.out)
        clock.wait(clock.now + 20, "Leave the station")
        clock.go(hotel)
        clock.add(20, Kind.HOTEL, {"activity": "Check-in", "name": hotel})
    clock.wait(NINE, "Get ready")
    for mealtime, name in ((LUNCH, "Lunch"), (DINNER, "Dinner")):
        if last and name == "Dinner":
            clock.go(stops.back["dep_station_name"])
            clock.wait(_minutes(stops.back["dep_datetime"]), "Security check and boarding")
            clock.ride(stops.mode, stops.back)
            break
        sight = todo.pop(0)
        clock.go(sight["attraction_name"])
        price = int(sight["ticket_price"])
        clock.add(90, Kind.ATTRACTION, {"name": sight["attraction_name"], "city": city, "cost": price})
        clock.wait(mealtime, "Free time")
        table = _table(stops, sight["attraction_name"], eaten)
        clock.go(table["restaurant_name"])
        price = int(table["price_per_person"])
        clock.add(60, Kind.MEAL, {"meal_type": name, "name": table["restaurant_name"], "cost": price})
    day: Day = {"day_number": number, "current_city": city, "activities": clock.activities}
    if first:
        day["current_city"] = f"from {origin} to {city}"
    if last:
        day["current_city"] = f"from {city} to {origin}"
    else:
        clock.go(hotel)
        clock.add(MIDNIGHT - clock.now, Kind.HOTEL, {"activity": "Rest", "name": hotel})
        day["accommodation"] = {"name": hotel, "price_per_night": int(stops.hotel["price"])}
    return day


def _table(stops: Stops, sight: str, eaten: set[str]) -> Row:
    """A restaurant near a sight: the required restaurant, else the cheapest that is not visited yet."""
    near = [r for r in stops.restaurants if r["nearby_attraction_name"] == sight and r["restaurant_name"] not in eaten]
    table = stops.must_eat if stops.must_eat in near else min(near, key=lambda row: int(row["price_per_person"]))
    eaten.add(table["restaurant_name"])
    return table


class _Clock:
    """Current place and time; every method appends activities."""

    def __init__(self, road: Road, now: int, at: str) -> None:
        self.road, self.now, self.at = road, now, at
        self.activities: list[Activity] = []

    def add(self, minutes: int, kind: str, details: dict[str, Any]) -> None:
        slot = f"{_time(self.now)}-{_time(self.now + minutes)}"
        self.activities.append({"time_slot": slot, "type": kind, "details": details})
        self.now += minutes

    def go(self, to: str) -> None:
        meters, minutes, fare = self.road(self.at, to)
        ride = {"from": self.at, "to": to, "distance": f"{meters / 1000:.1f}km", "duration": f"{minutes}min"}
        self.add(minutes, Kind.CITY_RIDE, ride | {"cost": fare})
        self.at = to

    def wait(self, until: int, why: str) -> None:
        if until > self.now:
            self.add(until - self.now, Kind.BUFFER, {"description": why})

    def ride(self, mode: str, leg: Row) -> None:
        self.now = _minutes(leg["dep_datetime"])
        ends = {"from": leg["dep_station_name"], "to": leg["arr_station_name"], "cost": int(leg["price"])}
        minutes = _minutes(leg["arr_datetime"]) - self.now
        self.add(minutes, Kind.INTERCITY, {"mode": mode, "number": leg[f"{mode}_no"]} | ends)
        self.at = leg["arr_station_name"]


def _minutes(moment: str) -> int:
    hours, minutes = moment.split(" ")[1].split(":")[:2]
    return int(hours) * 60 + int(minutes)


def _time(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"
