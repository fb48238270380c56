"""Fields of a plan in the official JSON layout, and the cost of a trip.

    {"budget_summary": {"total_estimated_budget": 2923, …},
     "daily_plans": [{"day_number": 1, "current_city": "from Hefei to Nanjing",
                      "accommodation": {"name": "Orange Hotel", "price_per_night": 441},
                      "activities": [{"time_slot": "13:23-16:00", "type": "attraction",
                                      "details": {"name": "Laomendong", "city": "Nanjing", "cost": 0}}, …]}, …]}
Plans may come from any file, so no field is guaranteed; a field of the wrong type raises one of MALFORMED.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

Plan = dict[str, Any]
Day = dict[str, Any]
Activity = dict[str, Any]

MALFORMED = (AttributeError, KeyError, TypeError, ValueError, OverflowError)
SEATS_PER_TAXI = 4
_BRACKETS = re.compile(r"[（(].*?[)）]")
_FROM_TO = re.compile(r"from\s(.+?)\sto\s([^,]+)")


class Kind(StrEnum):
    """The type of an activity."""

    INTERCITY = "travel_intercity_public"
    CITY_RIDE = "travel_city"
    ATTRACTION = "attraction"
    MEAL = "meal"
    HOTEL = "hotel"
    BUFFER = "buffer"


def activities(day: Day, kind: Kind | None = None) -> list[Activity]:
    """The activities of a day in order; only those of type `kind` if given."""
    return [act for act in day.get("activities") or [] if kind is None or act.get("type") == kind]


def details(activity: Activity) -> dict[str, Any]:
    return activity.get("details") or {}


def trimmed(value: Any) -> str:
    """A name without surrounding blanks; None becomes ""."""
    return (value or "").strip()


def name_of(activity: Activity) -> str:
    return trimmed(details(activity).get("name"))


def bare_city(name: str) -> str:
    """A city name without bracketed parts: "Suzhou (Jiangsu)" -> "Suzhou"."""
    return _BRACKETS.sub("", name).strip()


def cities_of(day: Day) -> tuple[str, str] | None:
    """("Hefei", "Nanjing") for a day "from Hefei to Nanjing"; None for a day in one city."""
    city = day.get("current_city", "")
    match = _FROM_TO.search(city) if isinstance(city, str) else None
    if not match or not match[1].strip() or not match[2].strip():
        return None
    return bare_city(match[1]), bare_city(match[2])


def total_cost(days: list[Day], meta: dict[str, Any]) -> float:
    """Cost in yuan for the whole party by the official formula; a cost that is missing or not a number counts 0.

    Per person: meals, tickets, and the first intercity leg of a day with a numeric cost (each leg of a connection
    shows the fare of the whole route). Per room: every night except the last day's. Per taxi of 4 seats: city rides.
    """
    people, rooms = int(meta.get("people_number", 1)), int(meta.get("room_number", 1))
    taxis = max(1, -(-people // SEATS_PER_TAXI))
    rides = nights = meals = tickets = 0.0  # four sums, added last: float addition in another order could differ
    for day in days:
        fares = (number(details(leg).get("cost", 0)) for leg in activities(day, Kind.INTERCITY))
        fare = next((fare for fare in fares if fare is not None), 0.0)
        if fare > 0:
            rides += fare * people
    for day in days[:-1]:
        stay = day.get("accommodation")
        if isinstance(stay, dict):
            nights += _cost(stay.get("price") or stay.get("price_per_night") or stay.get("cost")) * rooms
    for day in days:
        for meal in activities(day, Kind.MEAL):
            meals += _cost(details(meal).get("cost")) * people
        for visit in activities(day, Kind.ATTRACTION):
            tickets += _cost(details(visit).get("cost")) * people
        for ride in activities(day, Kind.CITY_RIDE):
            rides += _cost(details(ride).get("cost")) * taxis
    return rides + nights + meals + tickets


def number(value: Any) -> float | None:
    """None for what is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _cost(value: Any) -> float:
    return (number(value) or 0.0) if value else 0.0
