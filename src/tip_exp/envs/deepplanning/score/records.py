"""Commonsense checks that hold a plan against the task's tables and its own sums: prices, hours, durations, repeats.

A place that is not on record fails the check of its name only; the checks of hours and durations pass over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tip_exp.envs.deepplanning.data import Row
from tip_exp.envs.deepplanning.plan.schema import (
    ATTRACTION,
    HOTEL,
    INTERCITY,
    MEAL,
    Activity,
    Party,
    activities,
    details,
    text,
    total_cost,
)
from tip_exp.envs.deepplanning.score.clock import Slot, clock, slot, slot_of_day, within_hours
from tip_exp.envs.deepplanning.score.tables import Trip, number, yuan

MEAL_MINUTES = (30, 150)  # the prompt tells the model 60 to 120
COST_TOLERANCE = 0.10
ALWAYS_OPEN = ("全天开放", "Open 24 Hours")
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
WEEKDAYS = {
    name: day
    for names in (_DAYS, ("周一", "周二", "周三", "周四", "周五", "周六", "周日"))
    for day, name in enumerate(names, 1)
}


def hotels_on_record(trip: Trip) -> bool:
    """Every accommodation with its price, every hotel activity by name; on the last day neither has to be there."""
    hotels, last = trip.world.hotels, len(trip.days) - 1
    right = bool(hotels)
    for place, day in enumerate(trip.days):
        stay = day.get("accommodation")
        if isinstance(stay, dict):
            name = text(stay.get("name"))
            price = stay.get("price") or stay.get("cost") or stay.get("price_per_night")
            if name and not (place == last and name == "-"):
                right &= name in hotels and _same_price(price, hotels[name].get("price"))
        for act in activities(day, HOTEL) if place != last else ():
            name = text(details(act).get("name"))
            right &= not name or name in hotels
    return right


def attractions_on_record(trip: Trip) -> bool:
    return _on_record(trip, ATTRACTION, trip.world.attractions, "ticket_price")


def meals_on_record(trip: Trip) -> bool:
    return _on_record(trip, MEAL, trip.world.restaurants, "price_per_person")


def legs_on_record(trip: Trip) -> bool:
    """Every leg tells number, stations and cost; its number is on record and its cost that of any row with it."""
    right = True
    for leg in map(details, trip.activities(INTERCITY)):
        told = all(leg.get(field) not in (None, "") for field in ("number", "from", "to", "cost"))
        fares = trip.world.fares.get(str(leg["number"]).strip()) if told else None
        if fares is None:
            right = False
        elif (cost := _stated(leg["cost"])) is not None and any(number(fare) is not None for fare in fares):
            right &= round(cost) in [yuan(fare) for fare in fares]
    return right


def visits_while_open(trip: Trip) -> bool:
    """Unknown hours, or a slot that is no time, fail a visit, unless the place never closes."""

    def fits(act: Activity, row: Row) -> bool:
        if all(text(row.get(column)) in ALWAYS_OPEN for column in ("opening_time", "closing_time")):
            return True
        hours = _business_hours(row)
        visit = slot_of_day(act.get("time_slot"))
        return visit is not None and hours is not None and within_hours(visit, *hours)

    return _all_fit(trip, ATTRACTION, fits)


def meals_while_open(trip: Trip) -> bool:
    """A slot that is no time fails a meal; unknown hours pass it."""

    def fits(act: Activity, row: Row) -> bool:
        hours = _business_hours(row)
        visit = slot_of_day(act.get("time_slot"))
        return visit is not None and (hours is None or within_hours(visit, *hours))

    return _all_fit(trip, MEAL, fits)


def visits_on_open_days(trip: Trip) -> bool:
    """No attraction on a weekday on which it is closed; a task that tells no weekday passes."""
    attractions, first = trip.world.attractions, trip.meta.get("depart_weekday")
    if not attractions or not first:
        return bool(attractions)
    right = True
    for place, day in enumerate(trip.days):
        weekday = (int(first) + place - 1) % 7 + 1  # 1 = Monday
        for act in activities(day, ATTRACTION):
            row = attractions.get(text(details(act).get("name")))
            closed = (row.get("closing_dates") or "").split(",") if row else []
            right &= weekday not in [WEEKDAYS.get(name.strip().lower()) for name in closed]
    return right


def visits_last_as_advised(trip: Trip) -> bool:
    """Between the shortest and the longest advised hours; unknown ones fail."""

    def fits(act: Activity, row: Row) -> bool:
        visit = slot(act.get("time_slot"))
        shortest, longest = number(row.get("min_visit_hours")), number(row.get("max_visit_hours"))
        if visit is None or shortest is None or longest is None:
            return False
        return shortest <= (visit[1] - visit[0]) / 60.0 <= longest

    return _all_fit(trip, ATTRACTION, fits)


def meals_last_as_usual(trip: Trip) -> bool:
    """Every named meal lasts MEAL_MINUTES."""
    shortest, longest = MEAL_MINUTES
    slots = [slot(act.get("time_slot")) for act in trip.activities(MEAL) if text(details(act).get("name"))]
    return all(meal is not None and shortest <= meal[1] - meal[0] <= longest for meal in slots)


def total_is_right(trip: Trip) -> bool:
    """The stated total is within a tenth of itself of what the plan costs."""
    summary = trip.plan.get("budget_summary") or {}
    stated = _stated(summary.get("total_estimated_budget"))
    if stated is None:
        return False
    cost = total_cost(trip.days, Party.of(trip.meta))
    return cost == 0 if stated == 0 else abs(cost - stated) / stated <= COST_TOLERANCE


def no_meal_twice(trip: Trip) -> bool:
    return _no_name_twice(trip, MEAL)


def no_attraction_twice(trip: Trip) -> bool:
    return _no_name_twice(trip, ATTRACTION)


def _on_record(trip: Trip, kind: str, rows: dict[str, Row], price_column: str) -> bool:
    right = bool(rows)
    for visit in map(details, trip.activities(kind)):
        name = text(visit.get("name"))
        right &= name in rows and _same_price(visit.get("cost"), rows[name].get(price_column))
    return right


def _all_fit(trip: Trip, kind: str, fits: Callable[[Activity, Row], bool]) -> bool:
    """Whether `fits(activity, row)` for all activities whose place is on record; False where nothing is on record."""
    rows = trip.world.attractions if kind == ATTRACTION else trip.world.restaurants
    found = [(act, rows.get(text(details(act).get("name")))) for act in trip.activities(kind)] if rows else []
    return bool(rows) and all([fits(act, row) for act, row in found if row is not None])


def _no_name_twice(trip: Trip, kind: str) -> bool:
    names = [name for act in trip.activities(kind) if (name := details(act).get("name"))]
    return len(set(names)) == len(names)


def _same_price(planned: Any, on_record: str | None) -> bool:
    """Equal in whole yuan. No price on record agrees with any, a planned price that is no number with none."""
    recorded = yuan(on_record)
    if recorded is None:
        return True
    if not isinstance(planned, int | float):
        return False
    try:
        return round(float(planned)) == recorded
    except (OverflowError, ValueError):  # infinite or not a number: the official comparison is skipped
        return True


def _stated(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _business_hours(row: Row) -> Slot | None:
    opening, closing = clock(row.get("opening_time")), clock(row.get("closing_time"))
    return None if opening is None or closing is None else (opening, closing)
