"""Reads one line of a plan: prices off its right end, labels off its left, and what is left is a name, verbatim.

Names hold commas ("China Knife, Scissors, and Sword Museum") and dashes ("Home Inn - Beijing Yansha Branch"), so
nothing is split where a name could be.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from tip_exp.envs.deepplanning.plan.schema import ATTRACTION, BUFFER, CITY_RIDE, HOTEL, INTERCITY, MEAL

Number = int | float

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,3}|[0-9]{1,9})(?:\.[0-9]{1,4})?"
_PRICE = re.compile(
    rf"""(?:(?:price|cost|ticket|tickets|fee|fare|门票|票价|价格|人均|费用|房价)\s*[:：]?\s*)?
    (?:[¥￥$]\s*(?P<yuan>{_NUMBER}) | (?:RMB|CNY)\s*(?P<code>{_NUMBER})
      | (?P<bare>{_NUMBER})\s*(?:RMB|CNY|yuan|元|块)? | (?P<free>free|免费)(?:\s(?:entry|admission|of\scharge))?)
    \s*(?:[/x×*(（].*|per\s.*|each)?[.。;；)）\s]*""",
    re.IGNORECASE | re.VERBOSE,
)
_ABOUT = r"(?:约|大约|about|approx\.?|~|≈)?\s*"
_DISTANCE = re.compile(rf"{_ABOUT}{_NUMBER}\s*(?:km|m|meters?|metres?|kilometers?|公里|千米|米)", re.IGNORECASE)
_UNIT = r"(?:h|hrs?|hours?|mins?|minutes?|小时|分钟|分)"
_DURATION = re.compile(
    rf"{_ABOUT}{_NUMBER}(?:\s*[-–~]\s*{_NUMBER})?\s*{_UNIT}(?:\s*{_NUMBER}\s*{_UNIT})?", re.IGNORECASE
)
_RIDE = re.compile("taxi|walk|walking|drive|driving|bus|subway|metro|步行|打车|出租车", re.IGNORECASE)
_COMMA = re.compile("[,，]")
_SPACED_DASH = re.compile(r"\s[-–—]\s|→|⇒|->|=>")
_OTHER_WAYS = (re.compile("[-–—]"), re.compile(r"\sto\s|[到至]"))
_LEG_NUMBER = re.compile(
    r"(?<![A-Za-z0-9])(?:[A-Za-z0-9]{2}[0-9]{1,5}|[A-Za-z]?[0-9]{1,5})[A-Za-z]?(?![A-Za-z0-9])",
)
_TRAIN_NUMBER = re.compile(r"[A-Za-z]?[0-9]{1,4}")  # G56803 is a flight of the airline G5
_FLIGHT_WORDS = ("flight", "plane", "air", "航班", "飞机")
_TRAIN_WORDS = ("train", "rail", "火车", "高铁", "动车", "列车", "城际")
_MEAL_WORD = r"(?:breakfast|brunch|lunch|dinner|supper|早餐|早午餐|午餐|中餐|晚餐|夜宵)"
_MEAL_AT = re.compile(rf"({_MEAL_WORD})\s*(?:[:：]|\sat\s|\sin\s|\s[-–—]\s)\s*(.+)", re.IGNORECASE)
_HOTEL_AT = re.compile(
    r"(check[- ]?in|check[- ]?out|rest|return|stay)\s*(?:[:：]|\sat\s|\sto\s|\s[-–—]\s)\s*(.+)", re.I
)


def price(field: str) -> Number | None:
    """Yuan of a field that is nothing but a price: "¥1,200/person" -> 1200, "免费" -> 0, "East Wing" -> None."""
    match = _PRICE.fullmatch(field.strip())
    if not match:
        return None
    written = match["yuan"] or match["code"] or match["bare"]
    return _value(written) if written else 0


def amount(text: str) -> Number | None:
    """The sum a budget line states: "2820 RMB. Airfare (650+550)*2=2400" -> 2820, "650*2 + 60 = 1360 RMB" -> 1360."""
    text = text.replace("**", "")
    match = re.match(rf"[^0-9(（=]{{0,15}}({_NUMBER})\s*([-+*/x×=])?", text)
    if match and not match[2]:
        return _value(match[1])
    match = re.match(rf"[^0-9]{{0,15}}({_NUMBER})", text.rpartition("=")[2]) if "=" in text else match
    return _value(match[1]) if match else None


def take_price(text: str) -> tuple[str, Number | None]:
    """Cuts "Laomendong, ¥30/person" into ("Laomendong", 30); text without a price at its right end comes back whole."""
    text = text.strip()
    commas = [match.start() for match in _COMMA.finditer(text)]
    for comma in commas[-3:]:  # from the left, as in ¥1,200 the last comma is not the one
        found = price(text[comma + 1 :])
        if found is not None:
            return text[:comma].strip(), found
    sign = max(text.rfind("¥"), text.rfind("￥"))
    found = price(text[sign:].rstrip(")） ")) if sign > 0 else None
    name = text[: max(sign, 0)].rstrip(" (（,，:：")
    return (name, found) if found is not None and name else (text, None)


def route(text: str, known: Collection[str]) -> tuple[str, str]:
    """Cuts "A - B" into "A" and "B"; where a name has a dash itself, so that most and longest names are `known`."""

    def names(cut: tuple[str, str]) -> tuple[int, int]:
        lengths = [len(end) for end in cut if end in known]
        return len(lengths), sum(lengths)

    for separator in (_SPACED_DASH, *_OTHER_WAYS):
        cuts = [(text[: m.start()].strip(), text[m.end() :].strip()) for m in separator.finditer(text)]
        cuts = [cut for cut in cuts if all(cut)]
        if cuts:
            origin, destination = max(cuts, key=names)
            return origin.removeprefix("从").strip(), destination
    return text.strip(), ""


def read_details(kind: str, text: str, city: str, known: Collection[str]) -> dict[str, Any]:
    """The details of an activity of one type, in the official layout. `city` is where the traveller is."""
    text = text.strip()
    if kind == BUFFER:
        return {"description": text}
    body, cost = take_price(text)
    if kind == HOTEL:
        activity, name = _label(body, _HOTEL_AT, known)
        return {"activity": activity, "name": name}
    if kind == MEAL:
        label, name = _label(body, _MEAL_AT, known)
        if not name and not re.fullmatch(_MEAL_WORD, label, re.IGNORECASE):
            label, name = "", label
        return {"meal_type": label, "name": name, "cost": cost}
    if kind == ATTRACTION:
        return {"name": body, "city": city, "cost": cost}
    if kind == CITY_RIDE:
        return _ride(body, known) | {"cost": cost}
    assert kind == INTERCITY, f"no line is of type {kind}"
    return _leg(body, known) | {"cost": cost}


def _value(written: str) -> Number:
    number = float(written.replace(",", ""))
    return int(number) if number.is_integer() else number


def _label(body: str, pattern: re.Pattern[str], known: Collection[str]) -> tuple[str, str]:
    """Cuts "Lunch, NAME" or "Lunch at NAME" into ("Lunch", NAME); a lone label has no name, a known name no label."""
    if body in known:
        return "", body
    label, name = _cut(body)
    match = None if name else pattern.fullmatch(body)
    return (match[1], match[2].strip()) if match else (label, name)


def _ride(body: str, known: Collection[str]) -> dict[str, str]:
    measures = {"distance": "", "duration": ""}
    while True:
        if not measures["distance"] and (found := _last_field(body, _DISTANCE)):
            body, measures["distance"] = found
        elif not measures["duration"] and (found := _last_field(body, _DURATION)):
            body, measures["duration"] = found
        elif found := _last_field(body, _RIDE):
            body = found[0]
        else:
            break
    origin, destination = route(body, known)
    return {"from": origin, "to": destination} | measures


def _last_field(body: str, pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """What stands before and in the last field, if that is of the pattern; 1,200m is one field, not two."""
    for comma in [match.start() for match in _COMMA.finditer(body)][-2:]:
        field = body[comma + 1 :].strip()
        if pattern.fullmatch(field):
            return body[:comma].strip(), field
    return None


def _leg(body: str, known: Collection[str]) -> dict[str, str]:
    head, rest = _cut(body)
    number = _LEG_NUMBER.search(head)
    word = (head[: number.start()] if number else head).strip(" :：").lower()
    if not rest and number:  # no comma: "train G7798 A - B"
        rest = head[number.end() :].strip()
    field, behind = _cut(rest)
    if (
        behind and not _SPACED_DASH.search(field) and _SPACED_DASH.search(behind)
    ):  # "train, G7798, A - B", "…, seat, A - B"
        number = number or _LEG_NUMBER.fullmatch(field)
        rest = behind
    if any(name in word for name in _FLIGHT_WORDS):
        mode = "flight"
    elif any(name in word for name in _TRAIN_WORDS):
        mode = "train"
    elif word or not number:
        mode = word
    else:
        mode = "train" if _TRAIN_NUMBER.fullmatch(number[0]) else "flight"
    origin, destination = route(rest, known)
    return {"mode": mode, "number": number[0] if number else "", "from": origin, "to": destination}


def _cut(text: str) -> tuple[str, str]:
    """The first field and the rest."""
    comma = _COMMA.search(text)
    return (text[: comma.start()].strip(), text[comma.end() :].strip()) if comma else (text.strip(), "")
