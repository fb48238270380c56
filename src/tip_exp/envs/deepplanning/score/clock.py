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


def slot(value: Any) -> Slot | None:
    """ "09:00-10:30" -> (540, 630). The end is never below the start: "23:00-01:00" -> (1380, 1500)."""
    match = _SLOT.match(value) if isinstance(value, str) else None
    if not match:
        return None
    start, end = clock(match[1]), clock(match[2])
    if start is None or end is None:
        return None
    return (start, end + MINUTES_PER_DAY) if end < start else (start, end)


def within_hours(visit: Slot, opening: int, closing: int) -> bool:
    """Whether a visit is inside business hours. Both may run past midnight: then closing is below opening."""
    start, end = visit
    if opening <= closing:
        return opening <= start and end <= closing
    return (opening <= start and end <= closing + MINUTES_PER_DAY) or end <= closing


def loose_time(activity: dict[str, Any], which: int) -> tuple[int, int] | None:
    """Hours and minutes of start (0) or end (1), without range checks: "9:05" -> (9, 5), "25:99" -> (25, 99).

    They are the activity's start_time or end_time, else a half of its time slot; None if that is not a time.
    """
    written = activity.get(("start_time", "end_time")[which])
    if not written:
        slot_text = activity.get("time_slot") or ""
        written = slot_text.split("-")[which] if "-" in slot_text else ""
    try:
        hours, minutes = map(int, written.split(":"))
    except (AttributeError, TypeError, ValueError):
        return None
    return hours, minutes


def loose_hours(activity: dict[str, Any], which: int) -> float | None:
    """Start or end in hours: "9:30" -> 9.5."""
    time = loose_time(activity, which)
    return None if time is None else time[0] + time[1] / 60.0
