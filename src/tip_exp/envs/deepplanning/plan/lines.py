"""Parses one line of a plan: removes prices at its right end and labels at its left; the remainder is the name.

Names contain commas ("China Knife, Scissors, and Sword Museum") and dashes ("Home Inn - Beijing Yansha Branch"), so a
line is not split at every comma or dash. `names` are place names that the plan states elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from tip_exp.envs.deepplanning.plan.schema import Kind

_ABOUT = r"(?:约|大约|about|approx\.?|~|≈)?\s*"
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,3}|[0-9]{1,9})(?:\.[0-9]{1,4})?"
_PRICE = re.compile(
    rf"""(?:(?:price|cost|ticket|tickets|fee|fare|门票|票价|价格|人均|费用|房价)\s*[:：]?\s*)?{_ABOUT}
    (?:[¥￥$]\s*(?P<yuan>{_NUMBER}) | (?:RMB|CNY)\s*(?P<code>{_NUMBER})
      | (?P<bare>{_NUMBER})\s*(?:RMB|CNY|yuan|元|块)? | (?P<free>free|免费)(?:\s(?:entry|admission|of\scharge))?)
    \s*(?:[/x×*(（].*|per\s.*|each)?[.。;；)）\s]*""",
    re.IGNORECASE | re.VERBOSE,
)
_DISTANCE = re.compile(rf"{_ABOUT}{_NUMBER}\s*(?:km|m|meters?|metres?|kilometers?|公里|千米|米)", re.IGNORECASE)
_UNIT = r"(?:h|hrs?|hours?|mins?|minutes?|小时|分钟|分)"
_DURATION = re.compile(
    rf"{_ABOUT}{_NUMBER}(?:\s*[-–~]\s*{_NUMBER})?\s*{_UNIT}(?:\s*{_NUMBER}\s*{_UNIT})?", re.IGNORECASE
)
_RIDE = re.compile("taxi|walk|walking|drive|driving|bus|subway|metro|步行|打车|出租车", re.IGNORECASE)
_COMMA = re.compile("[,，]")
_SPACED_DASH = re.compile(r"\s[-–—]\s|→|⇒|->|=>")
_OTHER_SEPARATORS = (re.compile("[-–—]"), re.compile(r"\sto\s|[到至]"))
_LEG_NUMBER = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:[A-Z]{2}|[0-9][A-Z]) [0-9]{3,4}|[A-Za-z0-9]{2}[0-9]{1,5}|[A-Za-z]?[0-9]{1,5})[A-Za-z]?"
    r"(?![A-Za-z0-9])"
)  # CZ 3456 is CZ3456
_TRAIN_NUMBER = re.compile(r"[A-Za-z]?[0-9]{1,4}")  # G56803 is a flight of the airline G5
_FLIGHT_WORDS = ("flight", "plane", "航班", "飞机")
_TRAIN_WORDS = ("train", "rail", "火车", "高铁", "动车", "列车", "城际")
_MEAL_WORD = r"(?:breakfast|brunch|lunch|dinner|supper|早餐|早午餐|午餐|中餐|晚餐|夜宵)"
_MEAL_AT = re.compile(rf"({_MEAL_WORD})\s*(?:[:：]|\sat\s|\sin\s|\s[-–—]\s)\s*(.+)", re.IGNORECASE)
_HOTEL_AT = re.compile(
    r"(check[- ]?in|check[- ]?out|rest|return|stay)\s*(?:[:：]|\sat\s|\sto\s|\s[-–—]\s)\s*(.+)", re.I
)


def price(field: str) -> float | None:
    """Yuan of a field that is only a price: "¥1,200/person" -> 1200, "免费" -> 0, "East Wing" -> None."""
    match = _PRICE.fullmatch(field.strip())
    if not match:
        return None
    written = match["yuan"] or match["code"] or match["bare"]
    return _value(written) if written else 0


def amount(text: str) -> float | None:
    """The amount of a budget line: "2820 RMB. Airfare (650+550)*2=2400" -> 2820, "650*2 + 60 = 1360 RMB" -> 1360."""
    text = text.replace("**", "")
    match = re.match(rf"[^0-9(（=]{{0,15}}({_NUMBER})\s*([-+*/x×=])?", text)
    if match and not match[2]:
        return _value(match[1])
    match = re.match(rf"[^0-9]{{0,15}}({_NUMBER})", text.rpartition("=")[2]) if "=" in text else match
    return _value(match[1]) if match else None


def take_price(text: str) -> tuple[str, float | None]:
    """Splits "Laomendong, ¥30/person" into ("Laomendong", 30); without a price at the right end: (text, None)."""
    text = text.strip()
    commas = [match.start() for match in _COMMA.finditer(text)]
    for comma in commas[-3:]:  # leftmost first: in ¥1,200 the last comma is part of the price
        cost = price(text[comma + 1 :])
        if cost is not None:
            return text[:comma].strip(), cost
    sign = max(text.rfind("¥"), text.rfind("￥"))
    cost = price(text[sign:].rstrip(")） ")) if sign > 0 else None
    name = text[: max(sign, 0)].rstrip(" (（,，:：")
    return (name, cost) if cost is not None and name else (text, None)


def route(text: str, names: Collection[str]) -> tuple[str, str]:
    """Splits "A - B" into "A" and "B"; of several dashes the one between the most, then the longest `names` counts."""

    def match(ends: tuple[str, str]) -> tuple[int, int]:
        lengths = [len(end) for end in ends if end in names]
        return len(lengths), sum(lengths)

    for separator in (_SPACED_DASH, *_OTHER_SEPARATORS):
        splits = [(text[: m.start()].strip(), text[m.end() :].strip()) for m in separator.finditer(text)]
        splits = [ends for ends in splits if all(ends)]
        if splits:
            origin, destination = max(splits, key=match)
            return origin.removeprefix("从").strip(), destination
    return text.strip(), ""


def read_details(kind: str, text: str, city: str, names: Collection[str]) -> dict[str, Any]:
    """Details of an activity of type `kind`, in the official layout; `city` is that of an attraction."""
    text = text.strip()
    if kind == Kind.BUFFER:
        return {"description": text}
    body, cost = take_price(text)
    if kind == Kind.HOTEL:
        activity, name = _label(body, _HOTEL_AT, names)
        return {"activity": activity, "name": name}
    if kind == Kind.MEAL:
        label, name = _label(body, _MEAL_AT, names)
        if not name and not re.fullmatch(_MEAL_WORD, label, re.IGNORECASE):
            label, name = "", label
        return {"meal_type": label, "name": name, "cost": cost}
    if kind == Kind.ATTRACTION:
        return {"name": body, "city": city, "cost": cost}
    if kind == Kind.CITY_RIDE:
        return _ride(body, names) | {"cost": cost}
    assert kind == Kind.INTERCITY, f"unknown activity type {kind}"
    return _leg(body, names) | {"cost": cost}


def _value(written: str) -> float:
    number = float(written.replace(",", ""))
    return int(number) if number.is_integer() else number


def _label(body: str, pattern: re.Pattern[str], names: Collection[str]) -> tuple[str, str]:
    """Splits "Lunch, NAME" or "Lunch at NAME" into ("Lunch", NAME); a part that is missing is ""."""
    if body in names:
        return "", body
    label, name = _split_at_comma(body)
    match = None if name else pattern.fullmatch(body)
    return (match[1], match[2].strip()) if match else (label, name)


def _ride(body: str, names: Collection[str]) -> dict[str, str]:
    measures = {"distance": "", "duration": ""}
    while True:
        if not measures["distance"] and (fields := _last_field(body, _DISTANCE)):
            body, measures["distance"] = fields
        elif not measures["duration"] and (fields := _last_field(body, _DURATION)):
            body, measures["duration"] = fields
        elif fields := _last_field(body, _RIDE):
            body = fields[0]
        else:
            break
    origin, destination = route(body, names)
    return {"from": origin, "to": destination} | measures


def _last_field(body: str, pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """Text before the last field and that field, if it matches the pattern; "1,200m" is one field, not two."""
    for comma in [match.start() for match in _COMMA.finditer(body)][-2:]:
        field = body[comma + 1 :].strip()
        if pattern.fullmatch(field):
            return body[:comma].strip(), field
    return None


def _leg(body: str, names: Collection[str]) -> dict[str, str]:
    head, stations = _split_at_comma(body)
    number = _LEG_NUMBER.search(head)
    word = (head[: number.start()] if number else head).strip(" :：").lower()
    if not stations and number:  # no comma: "train G7798 A - B"
        stations = head[number.end() :].strip()
    field, tail = _split_at_comma(stations)
    if tail and not _SPACED_DASH.search(field) and _SPACED_DASH.search(tail):  # "train, G7798, A - B", "…, seat, A - B"
        number = number or _LEG_NUMBER.fullmatch(field)
        stations = tail
    if any(name in word for name in _FLIGHT_WORDS):
        mode = "flight"
    elif any(name in word for name in _TRAIN_WORDS):
        mode = "train"
    elif "air" in word:  # an airport train is no flight
        mode = "flight"
    elif word or not number:
        mode = word
    else:
        mode = "train" if _TRAIN_NUMBER.fullmatch(number[0]) else "flight"
    origin, destination = route(stations, names)
    return {"mode": mode, "number": number[0].replace(" ", "") if number else "", "from": origin, "to": destination}


def _split_at_comma(text: str) -> tuple[str, str]:
    """The text before and after the first comma."""
    comma = _COMMA.search(text)
    return (text[: comma.start()].strip(), text[comma.end() :].strip()) if comma else (text.strip(), "")
