"""Commonsense checks against the task's tables and the plan's own total: prices, hours, durations, repetitions.

Functions have the names of the official checks. A place that is not in the tables fails only the check of its name;
the checks of hours and durations skip it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tip_exp.envs.deepplanning.data import Row
from tip_exp.envs.deepplanning.plan.schema import Activity, Kind, activities, details, name_of, total_cost, trimmed
from tip_exp.envs.deepplanning.score.clock import clock, slot, within_hours
from tip_exp.envs.deepplanning.score.tables import Trip, number, yuan

MEAL_MINUTES = (30, 150)  # the prompt says 60 to 120
COST_TOLERANCE = 0.10
ALWAYS_OPEN = ("全天开放", "Open 24 Hours")
_WEEKDAYS = (
    ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    ("周一", "周二", "周三", "周四", "周五", "周六", "周日"),
)
WEEKDAYS = {name: day for names in _WEEKDAYS for day, name in enumerate(names, 1)}


def validated_accommodation(trip: Trip) -> bool:
    """Every accommodation is a recorded hotel at its price, every hotel activity at one; the last day is exempt."""
    hotels, last = trip.tables.hotels, len(trip.days) - 1
    passed = bool(hotels)
    for index, day in enumerate(trip.days):
        stay = day.get("accommodation")
        if isinstance(stay, dict):
            name = trimmed(stay.get("name"))
            price = stay.get("price") or stay.get("cost") or stay.get("price_per_night")
            if name and not (index == last and name == "-"):
                passed &= name in hotels and _same_price(price, hotels[name]["price"])
        if index != last:
            passed &= {name_of(act) for act in activities(day, Kind.HOTEL)} <= {"", *hotels}
    return passed


def validated_attractions(trip: Trip) -> bool:
    return _all_recorded(trip, Kind.ATTRACTION, trip.tables.attractions, "ticket_price")


def validated_meals(trip: Trip) -> bool:
    return _all_recorded(trip, Kind.MEAL, trip.tables.restaurants, "price_per_person")


def validated_transportation(trip: Trip) -> bool:
    """Every leg has number, stations and cost; its number is recorded, and its cost is the fare of one of its rows."""
    passed = True
    for leg in map(details, trip.activities(Kind.INTERCITY)):
        complete = all(leg.get(field) not in (None, "") for field in ("number", "from", "to", "cost"))
        fares = trip.tables.fares.get(str(leg["number"]).strip()) if complete else None
        if fares is None:
            passed = False
        elif (cost := number(leg["cost"])) is not None and any(number(fare) is not None for fare in fares):
            passed &= round(cost) in [yuan(fare) for fare in fares]
    return passed


def attraction_visit_within_opening_hours(trip: Trip) -> bool:
    """Unknown hours fail a visit, unless the attraction is always open."""

    def fits(act: Activity, row: Row) -> bool:
        always_open = all(row.get(column, "").strip() in ALWAYS_OPEN for column in ("opening_time", "closing_time"))
        return always_open or _during_business_hours(act, row, unknown=False)

    return _all_fit(trip, Kind.ATTRACTION, fits)


def dining_within_service_hours(trip: Trip) -> bool:
    """Unknown hours pass a meal."""
    return _all_fit(trip, Kind.MEAL, partial(_during_business_hours, unknown=True))


def avoidance_of_closure_days(trip: Trip) -> bool:
    """No attraction on a weekday on which it is closed; a task without a weekday of departure passes."""
    attractions, first = trip.tables.attractions, trip.meta.get("depart_weekday")
    if not attractions or not first:
        return bool(attractions)
    passed = True
    for index, day in enumerate(trip.days):
        weekday = (int(first) + index - 1) % 7 + 1  # 1 = Monday
        for act in activities(day, Kind.ATTRACTION):
            row = attractions.get(name_of(act))
            closed = row.get("closing_dates", "").split(",") if row else []
            passed &= weekday not in [WEEKDAYS.get(name.strip().lower()) for name in closed]
    return passed


def reasonable_duration_at_attractions(trip: Trip) -> bool:
    """Every visit lasts between the recorded minimum and maximum; unknown limits fail."""

    def fits(act: Activity, row: Row) -> bool:
        visit = slot(act.get("time_slot"))
        shortest, longest = (number(row.get(column, "")) for column in ("min_visit_hours", "max_visit_hours"))
        if visit is None or shortest is None or longest is None:
            return False
        return shortest <= (visit[1] - visit[0]) / 60.0 <= longest

    return _all_fit(trip, Kind.ATTRACTION, fits)


def reasonable_meal_duration(trip: Trip) -> bool:
    """Every meal with a name lasts MEAL_MINUTES."""
    shortest, longest = MEAL_MINUTES
    slots = [slot(act.get("time_slot")) for act in trip.activities(Kind.MEAL) if name_of(act)]
    return all(meal is not None and shortest <= meal[1] - meal[0] <= longest for meal in slots)


def cost_calculation_correctness(trip: Trip) -> bool:
    """The cost of the plan differs from its stated total by at most a tenth of the stated total."""
    summary = trip.plan.get("budget_summary") or {}
    stated = number(summary.get("total_estimated_budget"))
    if stated is None:
        return False
    cost = total_cost(trip.days, trip.meta)
    return cost == 0 if stated == 0 else abs(cost - stated) / stated <= COST_TOLERANCE


def diverse_meal_options(trip: Trip) -> bool:
    return _no_repeated_name(trip, Kind.MEAL)


def diverse_attraction_options(trip: Trip) -> bool:
    return _no_repeated_name(trip, Kind.ATTRACTION)


def _all_recorded(trip: Trip, kind: Kind, rows: dict[str, Row], price_column: str) -> bool:
    passed = bool(rows)
    for act in trip.activities(kind):
        name = name_of(act)
        passed &= name in rows and _same_price(details(act).get("cost"), rows[name].get(price_column, ""))
    return passed


def _all_fit(trip: Trip, kind: Kind, fits: Callable[[Activity, Row], bool]) -> bool:
    """Whether `fits(activity, row)` for all activities at recorded places; False if the table is empty."""
    rows = trip.tables.attractions if kind == Kind.ATTRACTION else trip.tables.restaurants
    pairs = [(act, rows.get(name_of(act))) for act in trip.activities(kind)] if rows else []
    return bool(rows) and all([fits(act, row) for act, row in pairs if row is not None])


def _during_business_hours(act: Activity, row: Row, unknown: bool) -> bool:
    """The verdict on a visit: False if its slot is unreadable, `unknown` if the hours are."""
    visit = slot(act.get("time_slot"))
    opening, closing = clock(row.get("opening_time")), clock(row.get("closing_time"))
    if visit is None:
        return False
    return unknown if opening is None or closing is None else within_hours(visit, opening, closing)


def _no_repeated_name(trip: Trip, kind: Kind) -> bool:
    names = [name for act in trip.activities(kind) if (name := details(act).get("name"))]
    return len(set(names)) == len(names)


def _same_price(planned: Any, recorded: str) -> bool:
    """Equal in whole yuan. Without a recorded price anything passes; a planned price that is not a number fails."""
    price = yuan(recorded)
    if price is None:
        return True
    if not isinstance(planned, int | float):
        return False
    try:
        return round(float(planned)) == price
    except (OverflowError, ValueError):  # infinite or NaN: the official evaluator skips the comparison
        return True
