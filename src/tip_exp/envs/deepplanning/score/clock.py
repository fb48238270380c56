"""Times of day as the official evaluator reads them: a strict reading of whole slots, a lax one of single times."""

from __future__ import annotations

import re
from typing import Any

MINUTES_A_DAY = 24 * 60
_SLOT = re.compile(r"\s*(\d{1,2}:\d{2})\s*-\s*(\d{1,2}:\d{2})\s*", re.ASCII)
_CLOCK = re.compile(r"(\d{1,2}):(\d{1,2})", re.ASCII)

Slot = tuple[int, int]  # minutes since midnight: start, end


def clock(value: Any) -> int | None:
    """Minutes since midnight: "08:30" -> 510; "24:00" is the day's last, 1439; what is no time of day is None."""
    if not isinstance(value, str):
        return None
    value = value.strip()
    if value == "24:00":
        return MINUTES_A_DAY - 1
    match = _CLOCK.fullmatch(value)
    if not match:
        return None
    hours, minutes = int(match[1]), int(match[2])
    return hours * 60 + minutes if hours < 24 and minutes < 60 else None


def slot_of_day(value: Any) -> Slot | None:
    """Reads "09:00-10:30" as (540, 630); past midnight the end lies before the start: "23:00-01:00" -> (1380, 60)."""
    match = _SLOT.match(value) if isinstance(value, str) else None
    if not match:
        return None
    start, end = clock(match[1]), clock(match[2])
    return None if start is None or end is None else (start, end)


def slot(value: Any) -> Slot | None:
    """As slot_of_day, the end never before the start: "23:00-01:00" -> (1380, 1500)."""
    minutes = slot_of_day(value)
    if minutes is None:
        return None
    start, end = minutes
    return (start, end + MINUTES_A_DAY) if end < start else (start, end)


def within_hours(visit: Slot, opening: int, closing: int) -> bool:
    """Does the visit lie inside business hours? Either may run past midnight."""
    start, end = visit
    past_midnight = end < start
    if opening <= closing:
        return not past_midnight and opening <= start and end <= closing
    if past_midnight:
        return opening <= start and end <= closing
    return (opening <= start and opening <= end) or (start <= closing and end <= closing)


def side(activity: dict[str, Any], which: int) -> str:
    """Start (0) or end (1) of an activity as text: its own field if it has one, else that part of the time slot."""
    written = activity.get(("start_time", "end_time")[which])
    if written:
        return written
    slot_text = activity.get("time_slot") or ""
    return slot_text.split("-")[which] if "-" in slot_text else ""


def lax_clock(value: Any) -> tuple[int, int] | None:
    """Hours and minutes of "9:05" without a limit, so "24:00" is (24, 0) and "25:99" passes too."""
    try:
        hours, minutes = map(int, value.split(":"))
    except (AttributeError, TypeError, ValueError):
        return None
    return hours, minutes


def lax_hours(value: Any) -> float | None:
    """Hours, "9:30" -> 9.5; None for what is no time."""
    time = lax_clock(value)
    return None if time is None else time[0] + time[1] / 60.0
