"""Commonsense checks of the days' order: cities, nights, meals, sights and the time between places.

Hours and counts are those the official evaluator uses; its own comments and the prompt give others.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise

from tip_exp.envs.deepplanning.plan.schema import (
    ATTRACTION,
    BUFFER,
    CITY_RIDE,
    HOTEL,
    INTERCITY,
    MEAL,
    Activity,
    Day,
    activities,
    details,
    text,
)
from tip_exp.envs.deepplanning.score.clock import MINUTES_A_DAY, Slot, lax_clock, lax_hours, side, slot
from tip_exp.envs.deepplanning.score.tables import Trip, bare_city

START, END = 0, 1
_FROM_TO = re.compile(r"from\s(.+?)\sto\s([^,]+)")
_MIN_BETWEEN_MEALS = 120
_SIGHTSEEING_MINUTES = 240  # or two attractions, on a day without a change of city
_ANCHORS = (HOTEL, ATTRACTION, MEAL, INTERCITY)


def cities_of(day: Day) -> tuple[str, str] | None:
    """("Hefei", "Nanjing") on a day "from Hefei to Nanjing", None on a day in one city."""
    city = day.get("current_city", "")
    match = _FROM_TO.search(city) if isinstance(city, str) else None
    if not match or not match[1].strip() or not match[2].strip():
        return None
    return bare_city(match[1].strip()) or "", bare_city(match[2].strip()) or ""


def lasts_as_asked(trip: Trip) -> bool:
    return len(trip.days) == int(trip.meta.get("days") or 0)


def closes_the_loop(trip: Trip) -> bool:
    """Leaves home and comes back, where first and last day say from where to where."""
    home = bare_city(trip.meta.get("org"))
    first, last = cities_of(trip.days[0]), cities_of(trip.days[-1])
    return (first is None or first[0] == home) and (last is None or last[1] == home)


def changes_city_by_a_leg(trip: Trip) -> bool:
    """Every day begins where the one before ended; a change of city has a leg whose stations lie in both."""
    here = bare_city(trip.meta.get("org"))
    right = bool(here)
    for day in trip.days:
        way = cities_of(day)
        if way is None:
            city = bare_city(day.get("current_city", ""))
            right &= bool(city) and city == here
            continue
        legs = [(text(leg.get("from")), text(leg.get("to"))) for leg in map(details, activities(day, INTERCITY))]
        towns = [tuple(bare_city(trip.world.city_of(station)) for station in leg) for leg in legs if all(leg)]
        right &= way[0] == here and way in towns
        here = way[1]
    return right


def nights_are_traceable(trip: Trip) -> bool:
    """Every night has a hotel activity and an accommodation; the last day has none, or "-"."""
    last = trip.days[-1].get("accommodation")
    if last and (not isinstance(last, dict) or text(last.get("name")) not in ("", "-")):
        return False
    return all(day.get("accommodation") and any(True for _ in activities(day, HOTEL)) for day in trip.days[:-1])


def days_end_at_a_hotel(trip: Trip) -> bool:
    """The last activity of every day but the last day's is at a hotel."""
    ends = [list(activities(day))[-1:] for day in trip.days[:-1]]
    return all(end and end[0].get("type") == HOTEL for end in ends)


def meals_suffice(trip: Trip) -> bool:
    """Two meals on a full day, fewer where the city is reached late or left early; two hours between two meals."""
    home = bare_city(trip.meta.get("org"))
    here = home
    right = bool(home)
    for day in trip.days:
        meals = _meal_times(day)
        way = cities_of(day)
        if way is None:
            right &= len(meals) >= 2 and _hours_apart(meals)
            continue
        origin, destination = way
        leaving = _leg_time(day, START) if origin == here and origin != home else None
        arriving = _leg_time(day, END) if destination != home else None
        if leaving is not None:
            if leaving < 9:
                right &= not meals
            elif leaving < 15:
                right &= len(meals) <= 1
            else:
                right &= bool(meals) and _hours_apart(meals)
        if arriving is not None:
            if arriving < 10:
                right &= len(meals) >= 2 and _hours_apart(meals)
            elif arriving < 15:
                right &= bool(meals) and _hours_apart(meals)
            else:
                right &= len(meals) <= 1
        here = destination
    return right


def attractions_suffice(trip: Trip) -> bool:
    """Two attractions or four hours of them on a full day; one where the city is reached before 12 or left after 16."""
    home = bare_city(trip.meta.get("org"))
    here = home
    right = bool(home)
    for day in trip.days:
        count = sum(1 for _ in activities(day, ATTRACTION))
        minutes = _sightseeing_minutes(day)
        way = cities_of(day)
        if way is None:
            right &= minutes >= _SIGHTSEEING_MINUTES or count >= 2
            continue
        origin, destination = way
        leaving = _leg_time(day, START) if origin == here and origin != home else None
        arriving = _leg_time(day, END) if destination != home else None
        if (leaving is not None and leaving > 16) or (arriving is not None and arriving < 12):
            right &= count >= 1
        here = destination
    return right


def nothing_overlaps(trip: Trip) -> bool:
    """No activity begins before the one that began before it has ended; slots that are no times are passed over."""
    right = True
    for day in trip.days:
        slots = [slot(act.get("time_slot")) for act in activities(day)]
        times = sorted((s for s in slots if s is not None), key=lambda s: s[START])
        right &= all(later[START] >= earlier[END] for earlier, later in pairwise(times))
    return right


def gaps_fit_the_roads(trip: Trip) -> bool:
    """Between two places lies about as much time as the road between them takes, waiting (`buffer`) not counted."""
    right = True
    for day in trip.days:
        timed = [(slot(act.get("time_slot")), act) for act in activities(day) if act.get("type") in _ANCHORS]
        anchors = [(times, act) for times, act in timed if times is not None]
        for (before, left), (after, reached) in pairwise(anchors):
            gap = after[START] - before[END]
            if gap < 0 and -gap > MINUTES_A_DAY // 2:  # the later one is after midnight
                gap += MINUTES_A_DAY
            if gap < 0:
                continue  # an overlap, which nothing_overlaps tells
            gap -= _waiting(day, before[END], after[START])
            origin, destination = _place(left, "to"), _place(reached, "from")
            minutes = None if origin == destination else trip.world.travel_minutes(origin, destination)
            if minutes is not None:
                least = min(max(0.0, minutes - 5), minutes // 10 * 10)
                most = max(minutes + 5, math.ceil(minutes / 10) * 10)
                right &= least <= gap <= most
    return right


def _meal_times(day: Day) -> list[Slot]:
    """Start and end in minutes of the meals whose times can be read, by start."""
    times = [[lax_clock(side(act, which)) for which in (START, END)] for act in activities(day, MEAL)]
    meals = [(a[0] * 60 + a[1], b[0] * 60 + b[1]) for a, b in times if a is not None and b is not None]
    return sorted(meals, key=lambda meal: meal[START])


def _hours_apart(meals: list[Slot]) -> bool:
    """Two hours between the first two meals; fewer than two are never too close."""
    return len(meals) < 2 or meals[1][START] - meals[0][END] >= _MIN_BETWEEN_MEALS


def _leg_time(day: Day, which: int) -> float | None:
    """Hour of the first intercity leg's start or end that can be read, so a connection counts by its first leg."""
    times = (lax_hours(side(leg, which)) for leg in activities(day, INTERCITY))
    return next((time for time in times if time is not None), None)


def _sightseeing_minutes(day: Day) -> int:
    """Minutes at attractions and in rides to or from one of them."""
    names = {text(details(act).get("name")) for act in activities(day, ATTRACTION)} - {""}
    total = 0
    for act in activities(day):
        ends = {text(details(act).get(end)) for end in ("from", "to")} if act.get("type") == CITY_RIDE else set()
        if act.get("type") == ATTRACTION or ends & names:
            total += _duration(act)
    return total


def _duration(act: Activity) -> int:
    """Whole minutes; in hours first and cut, as upstream, where 80 minutes may become 79."""
    start, end = act.get("start_time"), act.get("end_time")
    if not (start and end):
        start, end = side({"time_slot": act.get("time_slot")}, START), side({"time_slot": act.get("time_slot")}, END)
    begin, finish = lax_hours(start), lax_hours(end)
    if begin is None or finish is None:
        return 0
    hours = finish - begin
    return int((hours + 24 if hours < 0 else hours) * 60)


def _waiting(day: Day, left: int, reached: int) -> int:
    """Minutes of buffers that lie between two anchors, the first of which ended at `left`."""
    reached += MINUTES_A_DAY if reached < left else 0
    total = 0
    for act in activities(day):
        times = slot(act.get("time_slot")) if act.get("type", "").strip() == BUFFER else None
        if times is not None:
            start, end = (t + (MINUTES_A_DAY if times[START] < left else 0) for t in times)
            total += end - start if left <= start and end <= reached else 0
    return total


def _place(act: Activity, station: str) -> str:
    """Where an anchor is: a leg at one of its stations, others by name; without one the type stands in, as upstream."""
    field = station if act.get("type") == INTERCITY else "name"
    return (details(act).get(field) or act.get("type") or "").strip()
