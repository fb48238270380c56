"""What the scorers read from a plan in the official JSON layout, and what the trip costs.

    {"budget_summary": {"total_estimated_budget": 2923, …},
     "daily_plans": [{"day_number": 1, "current_city": "from Hefei to Nanjing",
                      "accommodation": {"name": "Orange Hotel", "price_per_night": 441},
                      "activities": [{"time_slot": "13:23-16:00", "type": "attraction",
                                      "details": {"name": "Laomendong", "city": "Nanjing", "cost": 0}}, …]}, …]}
Plans may come from anyone's file, so nothing here is guaranteed; a wrongly typed part raises one of MALFORMED.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Plan = dict[str, Any]
Day = dict[str, Any]
Activity = dict[str, Any]

INTERCITY = "travel_intercity_public"
CITY_RIDE = "travel_city"
ATTRACTION = "attraction"
MEAL = "meal"
HOTEL = "hotel"
BUFFER = "buffer"
TYPES = (INTERCITY, CITY_RIDE, ATTRACTION, MEAL, HOTEL, BUFFER)

MALFORMED = (AttributeError, KeyError, TypeError, ValueError, OverflowError)
SEATS_PER_TAXI = 4


@dataclass(frozen=True, slots=True)
class Party:
    """Who travels: people and hotel rooms, each at least 1 in the official data."""

    people: int
    rooms: int

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Party:
        return cls(int(meta.get("people_number", 1)), int(meta.get("room_number", 1)))


def activities(day: Day, kind: str | None = None) -> Iterator[Activity]:
    """A day's activities in order, of one type if `kind` is given."""
    for activity in day.get("activities") or []:
        if kind is None or activity.get("type") == kind:
            yield activity


def details(activity: Activity) -> dict[str, Any]:
    return activity.get("details") or {}


def text(value: Any) -> str:
    """A name as it is compared: None and "" are "", blanks around it do not count."""
    return (value or "").strip()


def total_cost(days: list[Day], party: Party) -> float:
    """Yuan for the whole party, by the official sum; costs that are missing or no numbers count 0.

    Per person: meals, tickets and a day's first intercity leg whose cost is a number (every leg of a connection shows
    the price of the whole). Per room: every night but the last day's. Per taxi of 4 seats: city rides.
    """
    rides = nights = meals = tickets = 0.0  # summed apart and added last, as floats of another order could differ
    for day in days:
        fares = (_number(details(leg).get("cost", 0)) for leg in activities(day, INTERCITY))
        fare = next((fare for fare in fares if fare is not None), 0.0)
        if fare > 0:
            rides += fare * party.people
    for day in days[:-1]:
        stay = day.get("accommodation")
        if isinstance(stay, dict):
            nights += _paid(stay.get("price") or stay.get("price_per_night") or stay.get("cost")) * party.rooms
    for day in days:
        for meal in activities(day, MEAL):
            meals += _paid(details(meal).get("cost")) * party.people
        for visit in activities(day, ATTRACTION):
            tickets += _paid(details(visit).get("cost")) * party.people
    taxis = max(1, -(-party.people // SEATS_PER_TAXI))
    for day in days:
        for ride in activities(day, CITY_RIDE):
            rides += _paid(details(ride).get("cost")) * taxis
    return rides + nights + meals + tickets


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _paid(value: Any) -> float:
    return (_number(value) or 0.0) if value else 0.0
