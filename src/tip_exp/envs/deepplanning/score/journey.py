"""Commonsense checks of the schedule: cities, nights, meals, attractions and the time between activities.

Functions have the names of the official checks. Hours and counts are those of the official evaluator's code; its
comments and the prompt give other values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from tip_exp.envs.deepplanning.plan.schema import (
    Activity,
    Day,
    Kind,
    activities,
    bare_city,
    cities_of,
    details,
    name_of,
    trimmed,
)
from tip_exp.envs.deepplanning.score.clock import MINUTES_PER_DAY, Slot, loose_hours, loose_time, slot
from tip_exp.envs.deepplanning.score.tables import Trip

START, END = 0, 1
_MIN_MINUTES_BETWEEN_MEALS = 120
_SIGHTSEEING_MINUTES = 240  # enough for a full day; two attractions also are
_ANCHORS = (Kind.HOTEL, Kind.ATTRACTION, Kind.MEAL, Kind.INTERCITY)
_FULL_DAY = (2, math.inf)  # fewest and most meals
_BEFORE_DEPARTURE = ((9, (0, 0)), (15, (0, 1)), (math.inf, (1, math.inf)))  # departure before this hour, meals
_AFTER_ARRIVAL = ((10, (2, math.inf)), (15, (1, math.inf)), (math.inf, (0, 1)))  # arrival before this hour, meals


def valid_trip_duration(trip: Trip) -> bool:
    return len(trip.days) == int(trip.meta.get("days") or 0)


def closed_loop_route_structure(trip: Trip) -> bool:
    """The first day starts and the last day ends at home; a day in one city passes."""
    first, last = cities_of(trip.days[0]), cities_of(trip.days[-1])
    return (first is None or first[0] == trip.home) and (last is None or last[1] == trip.home)


def seamless_intercity_transfers(trip: Trip) -> bool:
    """Every day starts where the previous one ended; a change of city has a leg whose stations are in both cities."""
    current = trip.home
    passed = bool(current)
    for day in trip.days:
        cities = cities_of(day)
        if cities is None:
            city = day.get("current_city", "")
            passed &= city is not None and bool(bare_city(city)) and bare_city(city) == current
            continue
        ends = [_ends(leg) for leg in activities(day, Kind.INTERCITY)]
        connections = [tuple(trip.tables.city_of(station) for station in leg) for leg in ends if all(leg)]
        passed &= cities[0] == current and cities in connections
        current = cities[1]
    return passed


def traceable_accommodation(trip: Trip) -> bool:
    """Every night has a hotel activity and an accommodation; the last day has no accommodation, or "-"."""
    last = trip.days[-1].get("accommodation")
    if last and (not isinstance(last, dict) or trimmed(last.get("name")) not in ("", "-")):
        return False
    return all(day.get("accommodation") and activities(day, Kind.HOTEL) for day in trip.days[:-1])


def ends_with_accommodation(trip: Trip) -> bool:
    """The last activity of every day except the last day is at a hotel."""
    ends = [activities(day)[-1:] for day in trip.days[:-1]]
    return all(end and end[0].get("type") == Kind.HOTEL for end in ends)


def essential_meal_coverage(trip: Trip) -> bool:
    """Two meals on a full day, fewer on a day with a late arrival or an early departure; two hours between meals."""
    passed = bool(trip.home)
    for day, departure, arrival in _travel_hours(trip):
        meals = _meal_times(day)
        limits: list[tuple[float, float]] = [_FULL_DAY] if cities_of(day) is None else []
        for hour, table in ((departure, _BEFORE_DEPARTURE), (arrival, _AFTER_ARRIVAL)):
            if hour is not None:
                limits.append(next(limit for end, limit in table if hour < end))
        if limits:
            passed &= _far_apart(meals) and all(fewest <= len(meals) <= most for fewest, most in limits)
    return passed


def essential_attraction_coverage(trip: Trip) -> bool:
    """Full day: two attractions or four hours of them. Arrival before 12:00 or departure after 16:00: one."""
    passed = bool(trip.home)
    for day, departure, arrival in _travel_hours(trip):
        count = len(activities(day, Kind.ATTRACTION))
        minutes = _sightseeing_minutes(day)
        if cities_of(day) is None:
            passed &= minutes >= _SIGHTSEEING_MINUTES or count >= 2
        elif (departure is not None and departure > 16) or (arrival is not None and arrival < 12):
            passed &= count >= 1
    return passed


def no_time_overlaps(trip: Trip) -> bool:
    """No activity starts before the one that started before it ends; slots that cannot be read are skipped."""
    passed = True
    for day in trip.days:
        slots = [slot(act.get("time_slot")) for act in activities(day)]
        times = sorted((s for s in slots if s is not None), key=lambda s: s[START])
        passed &= all(later[START] >= earlier[END] for earlier, later in pairwise(times))
    return passed


def reasonable_transfer_time(trip: Trip) -> bool:
    """The time between two places, buffers not counted, is about what the road between them takes."""
    passed = True
    for day in trip.days:
        timed = [(slot(act.get("time_slot")), act) for act in activities(day) if act.get("type") in _ANCHORS]
        anchors = [(times, act) for times, act in timed if times is not None]
        for (before, left), (after, reached) in pairwise(anchors):
            gap = after[START] - before[END]
            if gap < -MINUTES_PER_DAY / 2:  # the second activity is after midnight
                gap += MINUTES_PER_DAY
            if gap < 0:
                continue  # an overlap: no_time_overlaps reports it
            gap -= _buffer_minutes(day, before[END], after[START])
            origin, destination = _location(left, "to"), _location(reached, "from")
            minutes = None if origin == destination else trip.tables.travel_minutes(origin, destination)
            if minutes is not None:
                shortest = min(max(0.0, minutes - 5), minutes // 10 * 10)
                longest = max(minutes + 5, math.ceil(minutes / 10) * 10)
                passed &= shortest <= gap <= longest
    return passed


def _ends(leg: Activity) -> tuple[str, str]:
    return trimmed(details(leg).get("from")), trimmed(details(leg).get("to"))


def _travel_hours(trip: Trip) -> Iterator[tuple[Day, float | None, float | None]]:
    """Each day with the hour of departure from a city other than home, and of arrival in one; None without."""
    current = trip.home
    for day in trip.days:
        departure = arrival = None
        if cities := cities_of(day):
            origin, destination = cities
            if origin == current and origin != trip.home:
                departure = _leg_hour(day, START)
            if destination != trip.home:
                arrival = _leg_hour(day, END)
            current = destination
        yield day, departure, arrival


def _meal_times(day: Day) -> list[Slot]:
    """Start and end in minutes of the meals with readable times, by start."""
    times = [(loose_time(act, START), loose_time(act, END)) for act in activities(day, Kind.MEAL)]
    meals = [(a[0] * 60 + a[1], b[0] * 60 + b[1]) for a, b in times if a is not None and b is not None]
    return sorted(meals, key=lambda meal: meal[START])


def _far_apart(meals: list[Slot]) -> bool:
    """Whether two hours lie between the first two meals; True for fewer than two."""
    return len(meals) < 2 or meals[1][START] - meals[0][END] >= _MIN_MINUTES_BETWEEN_MEALS


def _leg_hour(day: Day, which: int) -> float | None:
    """Start or end hour of the first intercity leg with a readable time, so a connection counts by its first leg."""
    times = (loose_hours(leg, which) for leg in activities(day, Kind.INTERCITY))
    return next((time for time in times if time is not None), None)


def _sightseeing_minutes(day: Day) -> int:
    """Minutes at attractions and in rides to or from one of them."""
    names = {name_of(act) for act in activities(day, Kind.ATTRACTION)} - {""}
    visits = activities(day, Kind.ATTRACTION)
    visits += [ride for ride in activities(day, Kind.CITY_RIDE) if names.intersection(_ends(ride))]
    return sum(map(_duration, visits))


def _duration(act: Activity) -> int:
    """Minutes, computed in hours and truncated as upstream, so 80 minutes may become 79."""
    times = act if act.get("start_time") and act.get("end_time") else {"time_slot": act.get("time_slot")}
    begin, finish = loose_hours(times, START), loose_hours(times, END)
    if begin is None or finish is None:
        return 0
    hours = finish - begin
    return int((hours + 24 if hours < 0 else hours) * 60)


def _buffer_minutes(day: Day, left: int, reached: int) -> int:
    """Minutes of buffers between an activity that ends at `left` and one that starts at `reached`."""
    reached += MINUTES_PER_DAY if reached < left else 0
    total = 0
    for act in activities(day):
        times = slot(act.get("time_slot")) if act.get("type", "").strip() == Kind.BUFFER else None
        if times is not None:
            start, end = (t + (MINUTES_PER_DAY if times[START] < left else 0) for t in times)
            total += end - start if left <= start and end <= reached else 0
    return total


def _location(act: Activity, station: str) -> str:
    """Where an activity is: the station of a leg, else its name; without a name its type, as upstream."""
    field = station if act.get("type") == Kind.INTERCITY else "name"
    return (details(act).get(field) or act.get("type") or "").strip()
