"""Times of day as the official evaluator reads them: strictly for time slots, loosely for single times."""

from __future__ import annotations

import re
from typing import Any

MINUTES_PER_DAY = 24 * 60
_SLOT = re.compile(r"\s*(\d{1,2}:\d{2})\s*-\s*(\d{1,2}:\d{2})\s*", re.ASCII)
_CLOCK = re.compile(r"(\d{1,2}):(\d{1,2})", re.ASCII)

Slot = tuple[int, int]  # start and end in minutes since midnight


def clock(value: Any) -> int | None:
    """Minutes since midnight: "08:30" -> 510; "24:00" -> 1439, the last minute of the day; not a time -> None."""
    if not isinstance(value, str):
        return None
    value = value.strip()
    if value == "24:00":
        return MINUTES_PER_DAY - 1
    match = _CLOCK.fullmatch(value)
    if not match:
        return None
    hours, minutes = int(match[1]), int(match[2])
    return hours * 60 + minutes if hours < 24 and minutes < 60 else None


def wrapped_slot(value: Any) -> Slot | None:
    """ "09:00-10:30" -> (540, 630). Past midnight the end is below the start: "23:00-01:00" -> (1380, 60)."""
    match = _SLOT.match(value) if isinstance(value, str) else None
    if not match:
        return None
    start, end = clock(match[1]), clock(match[2])
    return None if start is None or end is None else (start, end)


def slot(value: Any) -> Slot | None:
    """Like wrapped_slot, but the end is never below the start: "23:00-01:00" -> (1380, 1500)."""
    minutes = wrapped_slot(value)
    if minutes is None:
        return None
    start, end = minutes
    return (start, end + MINUTES_PER_DAY) if end < start else (start, end)


def within_hours(visit: Slot, opening: int, closing: int) -> bool:
    """Whether a visit (as wrapped_slot gives it) is inside business hours. Both may run past midnight."""
    start, end = visit
    past_midnight = end < start
    if opening <= closing:
        return not past_midnight and opening <= start and end <= closing
    if past_midnight:
        return opening <= start and end <= closing
    return (opening <= start and opening <= end) or (start <= closing and end <= closing)


def side(activity: dict[str, Any], which: int) -> str:
    """Start (0) or end (1) of an activity as text: its start_time or end_time, else that half of the time slot."""
    written = activity.get(("start_time", "end_time")[which])
    if written:
        return written
    slot_text = activity.get("time_slot") or ""
    return slot_text.split("-")[which] if "-" in slot_text else ""


def loose_clock(value: Any) -> tuple[int, int] | None:
    """Hours and minutes without range checks: "9:05" -> (9, 5), "24:00" -> (24, 0), "25:99" -> (25, 99)."""
    try:
        hours, minutes = map(int, value.split(":"))
    except (AttributeError, TypeError, ValueError):
        return None
    return hours, minutes


def loose_hours(value: Any) -> float | None:
    """Hours: "9:30" -> 9.5; not a time -> None."""
    time = loose_clock(value)
    return None if time is None else time[0] + time[1] / 60.0
